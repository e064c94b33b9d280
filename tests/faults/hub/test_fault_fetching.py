"""Case 100, seen by a reader: not to know whether there is a manifest is not to have none."""

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import PeftModel
from transformers import AutoModelForCausalLM

from moeadapt.adapter_format.settings import MANIFEST, SETTINGS, WEIGHTS
from moeadapt.errors import AdapterFileError
from tests.hub.kit import BASE, REPO, add_base, connected, pushed, shelf
from tests.hub.loopback import TOKEN


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


def test_fault_105_all_files_are_of_the_commit_of_the_settings(hub, monkeypatch):
    original, asked = huggingface_hub.hf_hub_download, {}

    def fetch(repo_id, filename, **where):
        asked.setdefault(filename, where.get("revision"))
        return original(repo_id, filename, **where)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), REPO)
    head = hub.repositories[REPO].branches["main"]
    assert asked[SETTINGS] is None
    assert asked[WEIGHTS] == asked[MANIFEST] == head
