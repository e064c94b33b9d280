"""Cases 100 and 101: a hub that refuses, is slow or gone; and a machine without network."""

import os

import pytest
import torch
from huggingface_hub import constants
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

import moeadapt
from moeadapt.errors import ConfigError, HubError, MoeAdaptError
from tests.hub.kit import CARD, REPO, connected, copied, files_of, pushed, shelf
from tests.hub.loopback import TOKEN
from tests.hub.repositories import Repository
from tests.tiny import batch, logits, tiny

SAID = {
    401: "does not accept the token",
    403: "may not write there",
    404: "there is no such repository",
    409: "somebody else changed",
    412: "somebody else changed",
    413: "refuses files of this size",
    429: "refuses more requests for now",
    500: "a problem of its own",
    503: "a problem of its own",
}


@pytest.fixture
def hub(tmp_path):
    with connected(tmp_path / "home", token=TOKEN) as hub:
        yield hub


ROUTES = ("info", "create", "preupload", "batch", "upload")

CASES = [*(("commit", status) for status in SAID), *((r, s) for r in ROUTES for s in (403, 500))]


@pytest.mark.parametrize(("route", "status"), CASES)
def test_fault_100_every_refusal_is_typed_and_leaves_no_half_repository(hub, route, status):
    hub.fail(route, status=status, message=f"no, {TOKEN}")
    with pytest.raises(HubError, match=SAID[status]) as caught:
        pushed(shelf() / "adapter")
    assert str(status) in str(caught.value)
    assert REPO in str(caught.value)
    assert TOKEN not in str(caught.value)
    if REPO in hub.repositories:
        assert "the repository was made and is empty" in str(caught.value)
        assert list(files_of(hub)) == [".gitattributes"]
    hub.heal()
    assert pushed(shelf() / "adapter").commit == hub.repositories[REPO].branches["main"]


@pytest.mark.parametrize("route", ["preupload", "upload", "commit"])
@pytest.mark.parametrize("fault", [{"status": 500}, {"cut": True}])
def test_fault_100_a_repository_that_was_there_is_as_it_was(hub, tmp_path, route, fault):
    pushed(shelf() / "adapter")
    before = dict(files_of(hub))
    folder = copied(tmp_path)
    (folder / "recipe.yaml").write_text("dataset_name: ann/sums\n")
    hub.uploaded.clear()
    hub.fail(route, **fault)
    unknown = route == "commit" and "cut" in fault
    left = "not known whether the commit" if unknown else "nothing in the repository was changed"
    with pytest.raises(HubError, match=left):
        pushed(folder)
    assert files_of(hub) == before


@pytest.mark.parametrize("route", ["info", "create", "preupload", "batch", "upload", "commit"])
def test_fault_100_a_cut_connection_is_typed(hub, route):
    hub.fail(route, cut=True)
    with pytest.raises(HubError, match="the connection broke|did not answer in time"):
        pushed(shelf() / "adapter")
    assert REPO not in hub.repositories or list(files_of(hub)) == [".gitattributes"]


@pytest.mark.parametrize("route", ["info", "create", "upload", "commit"])
def test_fault_100_a_hub_that_does_not_answer_is_typed(hub, route, monkeypatch):
    monkeypatch.setattr("moeadapt.hub.client.TIMEOUT", 0.2)
    hub.fail(route, delay=0.6)
    left = "; it is not known whether the commit arrived" if route == "commit" else ""
    with pytest.raises(HubError, match=f"did not answer in time.*{left}"):
        pushed(shelf() / "adapter")


def test_fault_100_a_commit_in_between_is_not_overwritten(hub, monkeypatch):
    from moeadapt.hub.client import Remote

    pushed(shelf() / "adapter")
    state = Remote.state

    def late(self, revision):
        found = state(self, revision)
        hub.repositories[REPO].add("main", "by hand", {CARD: b"# mine, written meanwhile\n"})
        return found

    monkeypatch.setattr(Remote, "state", late)
    with pytest.raises(HubError, match="412: somebody else changed"):
        pushed(shelf() / "adapter")
    assert files_of(hub)[CARD] == b"# mine, written meanwhile\n"


def test_fault_100_a_repository_that_the_token_does_not_see_is_said_to_be_there(hub):
    hub.fail("create", status=409)
    with pytest.raises(HubError, match="cannot make ann/math: it exists, and the token does not"):
        pushed(shelf() / "adapter")


def test_fault_100_without_a_token_nothing_is_asked(tmp_path):
    with connected(tmp_path) as hub:
        with pytest.raises(HubError, match="there is no token; run `hf auth login`"):
            pushed(shelf() / "adapter")
        assert hub.log == []


def test_fault_100_another_kind_of_repository_is_not_written_over(hub):
    hub.repositories[REPO] = Repository()
    hub.repositories[REPO].add("main", "whole", {"config.json": b"{}"})
    with pytest.raises(ConfigError, match=r"holds a whole model \(config.json\)"):
        pushed(shelf() / "adapter")
    hub.repositories[REPO] = Repository()
    hub.repositories[REPO].add("main", "a LoRA", {"adapter_config.json": b"{}"})
    with pytest.raises(ConfigError, match="which moeadapt did not write"):
        pushed(shelf() / "adapter")
    assert hub.calls("commit") == []
    assert pushed(shelf() / "adapter", overwrite=True).commit


# --- offline


@pytest.fixture
def offline(tmp_path, monkeypatch):
    with connected(tmp_path / "home", token=TOKEN) as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
        yield hub
        assert hub.log == []


def test_fault_101_pushing_offline_is_refused(offline):
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set; unset it"):
        pushed(shelf() / "adapter")


WAYS = {
    "PeftModel": lambda: PeftModel.from_pretrained(tiny("llama"), REPO),
    "load_adapter": lambda: tiny("llama").load_adapter(REPO),
    "checked": lambda: moeadapt.load_adapter_checked(tiny("llama"), REPO),
}


@pytest.mark.parametrize("way", WAYS)
def test_fault_101_loading_offline_with_nothing_cached_names_the_cache(offline, way, tmp_path):
    with pytest.raises(MoeAdaptError, match="HF_HUB_OFFLINE is set") as caught:
        WAYS[way]()
    cache = str(tmp_path / "home" / "hub" / "models--ann--math")
    assert cache in str(caught.value)


@pytest.mark.parametrize("auto", [AutoPeftModelForCausalLM, AutoModelForCausalLM])
def test_fault_101_the_auto_classes_refuse_too(offline, auto):
    # PEFT and transformers look for a configuration before they know the method.
    with pytest.raises(
        (OSError, ValueError), match=f"{REPO}|couldn't find them in the cached files"
    ):
        auto.from_pretrained(REPO)


def test_fault_101_what_is_cached_loads_offline(tmp_path, monkeypatch):
    with connected(tmp_path / "home", token=TOKEN) as hub:
        pushed(shelf() / "adapter")
        base = AutoModelForCausalLM.from_pretrained(shelf() / "base")
        expected = logits(PeftModel.from_pretrained(base, REPO).eval(), batch())
        hub.heal()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
        again = AutoModelForCausalLM.from_pretrained(shelf() / "base")
        loaded = PeftModel.from_pretrained(again, REPO).eval()
        assert torch.equal(logits(loaded, batch()), expected)
        assert hub.log == []
