"""Exported and upcycled checkpoints: their own card, the receipt, and only as they were written."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moeadapt
from moeadapt.errors import ConfigError
from tests.hub.kit import BASE, CARD, REPO, connected, files_of, json_of, pushed, shelf
from tests.hub.loopback import TOKEN
from tests.tiny import adapt, batch, logits, moe_config

RECEIPT = "export_receipt.json"


@pytest.fixture
def hub(tmp_path):
    with connected(tmp_path / "home", token=TOKEN) as hub:
        yield hub


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    base = AutoModelForCausalLM.from_pretrained(shelf() / "base")
    config = moe_config("ffn", target_modules=["gate_proj", "up_proj", "down_proj"])
    out = tmp_path_factory.mktemp("out") / "exported"
    moeadapt.export(adapt(base, config, seed=1), out, verify=False)
    return out


@pytest.fixture(scope="module")
def upcycled(tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "upcycled"
    base = str(shelf() / "base")
    moeadapt.upcycle(base, out, sources=[base, base], top_k=1, verify=False)
    return out


def test_an_export_is_pushed_with_a_card_of_its_own_and_loads_without_moeadapt(hub, exported):
    result = pushed(exported)
    assert result.kind == "checkpoint"
    files = files_of(hub)
    assert {"config.json", "model.safetensors", RECEIPT, CARD, "tokenizer.json"} <= set(files)
    text = files[CARD].decode()
    fields = yaml.safe_load(text.split("---\n")[1])
    assert fields["library_name"] == "transformers"
    assert fields["base_model"] == BASE
    assert fields["base_model_relation"] == "finetune"
    assert {"moeadapt", "mixture-of-experts", "mixtral"} <= set(fields["tags"])
    assert f"vllm serve {REPO}" in text
    assert f'AutoModelForCausalLM.from_pretrained("{REPO}")' in text
    assert "written" in text
    assert "mixtral" in text
    assert "import moeadapt" not in text
    assert json_of(files[RECEIPT])["settings"]["base"] == BASE
    assert not [n for n, content in files.items() if str(shelf()).encode() in content]
    there, here = (AutoModelForCausalLM.from_pretrained(n).eval() for n in (REPO, exported))
    assert torch.equal(logits(there, batch()), logits(here, batch()))


def test_the_commands_of_a_branch_serve_that_branch(hub, exported):
    pushed(exported, revision="v2")
    text = files_of(hub, "v2")[CARD].decode()
    assert 'from_pretrained("ann/math", revision="v2")' in text
    commands = [
        line for line in text.splitlines() if line.startswith(("python -", "vllm serve", "hf "))
    ]
    assert len(commands) > 1
    for line in commands:
        assert "--revision v2" in line or "revision='v2'" in line, line


def test_an_upcycled_one_asks_for_its_base_and_says_how_it_was_made(hub, upcycled):
    with pytest.raises(ConfigError, match="--base-model owner/name"):
        pushed(upcycled, base_model=None)
    pushed(upcycled)
    text = files_of(hub)[CARD].decode()
    assert "By `moeadapt upcycle`" in text
    assert not [n for n, content in files_of(hub).items() if str(shelf()).encode() in content]


DAMAGE = {
    "no receipt": ("holds neither", lambda f: (f / RECEIPT).unlink()),
    "receipt": ("is no receipt", lambda f: (f / RECEIPT).write_text("{}")),
    "no config": ("has no config.json", lambda f: (f / "config.json").unlink()),
    "config": ("is damaged", lambda f: (f / "config.json").write_text("{")),
    "no weights": ("its weights are \\[\\]", lambda f: (f / "model.safetensors").unlink()),
    "cut weights": ("is damaged|has .* bytes", lambda f: cut(f / "model.safetensors")),
    "NaN": ("holds 1 NaN", lambda f: spoil(f / "model.safetensors")),
    "lists in the index": ("weight_map must name one file", lambda f: index(f, ["a"])),
    "index without a map": ("weight_map must name one file", lambda f: index(f, None)),
    "more weights": (
        "its weights have .* bytes",
        lambda f: shutil.copy(f / "model.safetensors", f / "model-2.safetensors"),
    ),
    "own code": ("runs no own code", lambda f: set_field(f / "config.json", auto_map={"a": "b"})),
}


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def spoil(path):
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})


def index(folder, file):
    weight_map = file and {"model.norm.weight": file}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def set_field(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("name", DAMAGE)
def test_a_folder_that_is_not_as_it_was_written_is_refused(hub, exported, tmp_path, name):
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    message, damage = DAMAGE[name]
    damage(folder)
    with pytest.raises(ConfigError, match=message):
        pushed(folder)
    assert hub.log == []


def test_what_belongs_to_adapters_is_refused(hub, exported, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: 1\n")
    with pytest.raises(ConfigError, match="belong to an adapter"):
        pushed(exported, recipe=recipe)
    with pytest.raises(ConfigError, match="a checkpoint is served as it is"):
        pushed(exported, with_static_lora=True)
    pushed(shelf() / "adapter")
    with pytest.raises(ConfigError, match="holds an adapter"):
        pushed(exported)
