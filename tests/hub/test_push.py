"""`moeadapt.push` of an adapter: what lands in the repository, and how often it is written."""

import hashlib
from pathlib import Path

import pytest

from moeadapt.errors import ConfigError
from tests.hub.kit import (
    BASE,
    CARD,
    MANIFEST,
    REPO,
    SETTINGS,
    WEIGHTS,
    connected,
    copied,
    files_of,
    json_of,
    pushed,
    shelf,
)
from tests.hub.loopback import TOKEN


@pytest.fixture
def hub(tmp_path):
    with connected(tmp_path / "home", token=TOKEN) as hub:
        yield hub
        assert not [one for one in hub.unknown if "agent" not in one]


def test_one_commit_holds_weights_settings_manifest_and_card(hub):
    result = pushed(shelf() / "adapter")
    files = files_of(hub)
    assert sorted(files) == sorted([".gitattributes", CARD, SETTINGS, WEIGHTS, MANIFEST])
    assert hub.calls("commit") == ["commit"]
    assert result.commit == hub.repositories[REPO].branches["main"]
    assert files[WEIGHTS] == (shelf() / "adapter" / WEIGHTS).read_bytes()
    settings = json_of(files[SETTINGS])
    assert settings["base_model_name_or_path"] == BASE
    assert settings["moeadapt_version"]
    assert settings["format_version"] == 1
    assert settings["base_fingerprint"]["hidden_size"] == 32
    manifest = json_of(files[MANIFEST])
    assert manifest["base"]["config"]["hidden_size"] == 32
    assert manifest["base"]["name"] == BASE
    for name, digest in manifest["files"].items():
        assert hashlib.sha256(files[name]).hexdigest() == digest
    assert set(manifest["files"]) == {SETTINGS, WEIGHTS}


def test_the_card_says_first_how_to_load_it(hub):
    pushed(shelf() / "adapter", datasets=["ann/sums"])
    text = files_of(hub)[CARD].decode()
    for line in (
        "library_name: peft",
        f"base_model: {BASE}",
        "base_model_relation: adapter",
        "pipeline_tag: text-generation",
        "license: apache-2.0",
        "- moeadapt",
        "- mixture-of-experts",
        f"- base_model:adapter:{BASE}",
        "- ann/sums",
    ):
        assert line in text
    first = text.partition("\n---\n")[2].splitlines()[:14]
    assert "pip install moeadapt" in first
    assert "import moeadapt" in first
    assert f'model = AutoPeftModelForCausalLM.from_pretrained("{REPO}")' in text


def test_pickles_and_checkpoints_stay_here(hub, tmp_path):
    folder = copied(tmp_path)
    (folder / "training_args.bin").write_bytes(b"a pickle")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "optimizer.pt").write_bytes(b"a pickle")
    result = pushed(folder)
    assert not [name for name in files_of(hub) if "bin" in name or "checkpoint" in name]
    assert result.left_out == {
        "checkpoint-5": "a folder",
        "training_args.bin": "a pickled file, which can run code where it is opened",
    }


def test_a_dry_run_sends_nothing_and_needs_no_token(tmp_path):
    with connected(tmp_path) as hub:
        result = pushed(shelf() / "adapter", dry_run=True)
        assert hub.log == []
    assert result.commit is None
    assert "pip install moeadapt" in result.card
    assert set(result.files) == {CARD, SETTINGS, WEIGHTS, MANIFEST}


@pytest.mark.parametrize("what", ["empty", "file", "missing", "base", "both"])
def test_anything_else_is_refused(hub, tmp_path, what):
    place: Path = tmp_path / "thing"
    if what == "empty":
        place.mkdir()
    elif what == "file":
        place.write_text("x")
    elif what == "base":
        place = shelf() / "base"
    elif what == "both":
        place = copied(tmp_path)
        (place / "export_receipt.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds neither|is no folder|holds both"):
        pushed(place)
    assert hub.log == []
