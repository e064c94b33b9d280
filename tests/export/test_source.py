"""Reading a dense checkpoint: every layout on disk, damaged files, nothing that runs code."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from moeadapt.errors import ConfigError
from moeadapt.export.source import FolderSource, ModelSource, open_source
from tests.export.bases import base


@pytest.mark.parametrize("shard", ["1GB", "40KB"])
@pytest.mark.parametrize("name", ["llama", "llama, tied, llama3 rope", "phi3"])
def test_a_folder_reads_as_its_model(name, shard, tmp_path):
    model = base(name)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    folder, memory = FolderSource(tmp_path), ModelSource(model)
    assert folder.tensors() == memory.tensors()
    assert ("lm_head.weight" in folder.tensors()) == (not model.config.tie_word_embeddings)
    for tensor in folder.tensors():
        assert_close(folder.read(tensor), memory.read(tensor), rtol=0.0, atol=0.0)
        some = folder.read(tensor, (3, 7))
        assert_close(some, model.state_dict()[tensor][3:7], rtol=0.0, atol=0.0)


def test_what_is_read_does_not_share_memory_with_the_model():
    model = base("llama")
    ModelSource(model).read("model.norm.weight").zero_()
    assert model.model.norm.weight.abs().min() > 0


def test_the_fingerprint_changes_with_one_weight(tmp_path):
    model = base("llama")
    model.save_pretrained(tmp_path / "a")
    prints = [FolderSource(tmp_path / "a").fingerprint(), ModelSource(model).fingerprint()]
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(tmp_path / "b")
    changed = [FolderSource(tmp_path / "b").fingerprint(), ModelSource(model).fingerprint()]
    assert prints[0] == FolderSource(tmp_path / "a").fingerprint()
    assert not set(prints) & set(changed)


def damaged(folder, how):
    weights = folder / "model.safetensors"
    if how == "cut off":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif how == "no weights":
        weights.unlink()
    elif how == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "code":
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"] = {"AutoConfig": "evil.Config"}
        config["model_type"] = "evil"
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "evil.py").write_text("raise SystemExit('ran')")
    else:
        index = {"weight_map": {"x": "../model.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut off", "damaged"),
        ("no weights", r"lacks \['model.safetensors'\]"),
        ("pickle", "pickle, which can run code"),
        ("no config", "no config.json"),
        ("code", "config.json"),
        ("outside", "outside its folder"),
    ],
)
def test_a_damaged_or_unsafe_folder_is_refused(how, message, tmp_path):
    base("llama").save_pretrained(tmp_path)
    damaged(tmp_path, how)
    with pytest.raises(ConfigError, match=message):
        open_source(tmp_path)


def test_packed_weights_are_refused(tmp_path):
    from moeadapt.export.shards import plan
    from moeadapt.export.targets import EXPORTERS, MoeShape

    model = base("llama")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    shape = MoeShape(num_experts=2, top_k=1, expert_width=64)
    with pytest.raises(ConfigError, match="load the unquantised base"):
        plan(EXPORTERS["mixtral"](model.config, shape), FolderSource(tmp_path).tensors())
    model.model.register_buffer("packed", torch.zeros(2, dtype=torch.int8))
    with pytest.raises(ConfigError, match="quantised"):
        ModelSource(model)
