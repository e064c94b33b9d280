"""Cases 100 and 105, seen by a reader: what was fetched and checked is what is loaded."""

from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from moeadapt.adapter_format.adapter import AdapterFiles
from moeadapt.adapter_format.settings import MANIFEST, SETTINGS, WEIGHTS
from moeadapt.errors import AdapterFileError, ConfigError
from moeadapt.tuner.checked import load_adapter_checked
from tests.faults.loading_kit import edit_settings, edit_tensors
from tests.hub.kit import BASE, REPO, add_base, connected, copied, pushed, shelf
from tests.hub.loopback import TOKEN
from tests.tiny import adapt, batch, logits, moe_config

FILES = (SETTINGS, WEIGHTS, MANIFEST)


@pytest.fixture
def hub(tmp_path):
    with connected(tmp_path / "home", token=TOKEN) as hub:
        add_base(hub)
        pushed(shelf() / "adapter")
        yield hub


def test_fault_100_without_an_answer_about_the_manifest_nothing_is_loaded(hub, monkeypatch):
    original = huggingface_hub.hf_hub_download

    def fetch(repo_id, filename, **where):
        if filename == MANIFEST:
            raise LocalEntryNotFoundError("no answer in time")
        return original(repo_id, filename, **where)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    base = AutoModelForCausalLM.from_pretrained(BASE)
    with pytest.raises(AdapterFileError, match=f"{MANIFEST} could not be fetched"):
        PeftModel.from_pretrained(base, REPO)


def resolved(hub):
    """Return (revision, file) of each request for a file of the adapter."""
    paths = [path for route, _, path, _ in hub.log if route == "resolve"]
    start = f"/{REPO}/resolve/"
    return [tuple(p.removeprefix(start).split("/", 1)) for p in paths if p.startswith(start)]


def test_fault_105_all_files_are_of_the_commit_of_the_settings(hub):
    base = AutoModelForCausalLM.from_pretrained(BASE)
    hub.heal()
    PeftModel.from_pretrained(base, REPO)
    head = hub.repositories[REPO].branches["main"]
    asked = resolved(hub)
    assert {file for revision, file in asked if revision == "main"} == {SETTINGS}
    assert {file for revision, file in asked if revision == head} >= {WEIGHTS, MANIFEST}


def next_commits(tmp_path):
    """Return what an owner may push while an adapter is loaded."""
    other = {"lora_alpha": 64}
    settings = edit_settings(copied(tmp_path / "s"), **other)
    weights = edit_tensors(copied(tmp_path / "w"), lambda t: {k: v + 1 for k, v in t.items()})
    return {
        "settings": {name: (settings / name).read_bytes() for name in (SETTINGS, MANIFEST)},
        "weights": {name: (weights / name).read_bytes() for name in (WEIGHTS, MANIFEST)},
        "pickled": {WEIGHTS: None, "adapter_model.bin": b"never opened"},
    }


@pytest.mark.parametrize("how", ["new", "beside", "native"])
@pytest.mark.parametrize("change", ["settings", "weights", "pickled"])
def test_fault_105_a_commit_in_between_changes_nothing(hub, tmp_path, monkeypatch, change, how):
    commit, original = next_commits(tmp_path)[change], AdapterFiles.__init__
    base = AutoModelForCausalLM.from_pretrained(BASE)
    expected = logits(PeftModel.from_pretrained(base, shelf() / "adapter").eval(), batch())

    def opened(self, folder):
        original(self, folder)
        hub.repositories[REPO].add("main", "in between", commit)

    base = AutoModelForCausalLM.from_pretrained(BASE)
    if how == "beside":
        base = PeftModel.from_pretrained(base, shelf() / "adapter", "first")
    monkeypatch.setattr(AdapterFiles, "__init__", opened)
    model = PeftModel.from_pretrained(base, REPO) if how == "new" else base
    if how != "new":
        base.load_adapter(REPO, "second")
        base.set_adapter("second")
    assert len(hub.repositories[REPO].commits) > 2, "there was a commit in between"
    assert torch.equal(logits(model.eval(), batch()), expected)


@pytest.mark.parametrize("load", ["new", "beside", "native"])
def test_fault_105_what_peft_alone_could_fetch_is_refused(hub, monkeypatch, load):
    """The hub answers at the second request: it was not checked, so it is not loaded."""
    base = AutoModelForCausalLM.from_pretrained(BASE)
    model = adapt(base, moe_config("block")) if load == "beside" else base
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    with pytest.raises(
        AdapterFileError, match=f"{SETTINGS}: .*could not be fetched.*load it again"
    ):
        PeftModel.from_pretrained(base, REPO) if load == "new" else model.load_adapter(REPO, "two")
    assert "two" not in getattr(model, "peft_config", {})
    assert load == "beside" or not any("moeadapt" in name for name, _ in base.named_modules())


def named_like_the_repository(inside):
    """Make a folder of the repository's name where the program runs."""
    folder = Path(REPO)
    folder.mkdir(parents=True)
    if inside == "a broken link":
        (folder / SETTINGS).symlink_to("nowhere")
    elif inside == "weights":
        save_file({"x": torch.ones(1)}, folder / WEIGHTS)
    elif inside == "a text":
        (folder / "notes.txt").write_text("mine")


@pytest.mark.parametrize("inside", ["nothing", "a text", "weights", "a broken link"])
@pytest.mark.parametrize("subfolder", [None, "sums"])
def test_fault_105_a_folder_named_like_the_repository_leaves_the_checks_on(
    hub, tmp_path, monkeypatch, inside, subfolder
):
    files = {name: (shelf() / "adapter" / name).read_bytes() for name in FILES}
    if subfolder:
        hub.repositories[REPO].add("main", "two", {f"sums/{n}": f for n, f in files.items()})
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    named_like_the_repository(inside)
    where = {"subfolder": subfolder} if subfolder else {}
    base = AutoModelForCausalLM.from_pretrained(BASE)
    model = PeftModel.from_pretrained(base, shelf() / "adapter", "first").eval()
    expected = logits(model, batch())
    model.load_adapter(REPO, "second", **where)
    model.set_adapter("second")
    assert torch.equal(logits(model.eval(), batch()), expected)
    damaged = bytearray(files[WEIGHTS])
    damaged[-3] ^= 4
    inner = f"{subfolder}/" if subfolder else ""
    hub.repositories[REPO].add("main", "damage", {inner + WEIGHTS: bytes(damaged)})
    with pytest.raises(AdapterFileError, match="sha256"):
        model.load_adapter(REPO, "third", **where)
    assert "third" not in model.peft_config


def test_fault_105_a_path_is_no_name_of_a_repository(hub):
    base = AutoModelForCausalLM.from_pretrained(BASE)
    hub.heal()
    with pytest.raises(ValueError, match=f"Can't find '{SETTINGS}'"):
        PeftModel.from_pretrained(base, Path(REPO))
    with pytest.raises(ConfigError, match="holds no moeadapt adapter"):
        load_adapter_checked(base, Path(REPO))
    assert resolved(hub) == []


def test_fault_105_transformers_looks_for_no_repository_beside_a_folder(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named_like_the_repository("nothing")
    base = AutoModelForCausalLM.from_pretrained(shelf() / "base")
    hub.heal()
    with pytest.raises(ValueError, match=f"adapter model file not found in {REPO}"):
        base.load_adapter(REPO)
    assert resolved(hub) == []
