"""Every expert as an ordinary LoRA, whose parts add up to the mixture."""

import pytest
import torch
from peft import PeftModel

import moeadapt
from moeadapt.errors import ConfigError, UnsupportedError
from moeadapt.tuner.plain import adapter_layers
from tests.merge.dense import always, deltas, num_experts
from tests.tiny import adapted, batch, logits, tiny


@pytest.mark.parametrize("kind", ["layer", "ffn"])
def test_each_folder_is_one_expert(tmp_path, kind):
    model = adapted("llama", kind, n_shared=1).double()
    folders = moeadapt.split(model, tmp_path / "out")
    assert sorted(folders) == ["expert_0", "expert_1", "expert_2", "expert_3", "shared"]
    for name, folder in folders.items():
        expected = tiny("llama").double()
        for key, layer in adapter_layers(model).items():
            weight = expected.get_submodule(key).weight.data
            routed = layer.moe_plans["default"].placement != "unrouted"
            if name == "shared":
                weight += always(layer)
            elif routed:
                weight += deltas(layer)[int(name[-1])]
        loaded = PeftModel.from_pretrained(tiny("llama").double(), str(folder)).eval()
        assert loaded.peft_config["default"].peft_type == "LORA"
        torch.testing.assert_close(
            logits(loaded, batch()), logits(expected, batch()), rtol=1e-4, atol=1e-4
        )


def test_layers_with_fewer_experts_add_nothing_for_the_others(tmp_path):
    model = adapted("llama", "layer", experts_pattern=[2, 4]).double()
    folders = moeadapt.split(model, tmp_path / "out")
    assert sorted(folders) == ["expert_0", "expert_1", "expert_2", "expert_3"]
    loaded = PeftModel.from_pretrained(tiny("llama").double(), str(folders["expert_3"])).eval()
    for key, layer in adapter_layers(model).items():
        lora = loaded.get_base_model().get_submodule(key)
        found = lora.get_delta_weight("default")
        expected = deltas(layer)[3] if num_experts(layer) == 4 else torch.zeros_like(found)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_parts_can_be_a_mixture_again(tmp_path):
    model = adapted("llama", "layer")
    folders = moeadapt.split(model, tmp_path / "out")
    again = adapted("llama", "layer", seed=7)
    moeadapt.init_from_adapters(again, [folders[f"expert_{e}"] for e in range(4)])
    for key, layer in adapter_layers(model).items():
        for mine, theirs in zip(deltas(layer), deltas(adapter_layers(again)[key]), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"experts": "ia3", "init_lora_weights": True}, UnsupportedError, "no low-rank matrices"),
        ({"init_lora_weights": "svd_segments"}, ConfigError, "belongs to no expert"),
    ],
)
def test_what_is_no_lora_is_refused(tmp_path, fields, error, message):
    with pytest.raises(error, match=message):
        moeadapt.split(adapted("llama", "layer", **fields), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_place_where_something_is_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for place in (tmp_path, tmp_path / "mine.txt", tmp_path / "mine.txt" / "out"):
        with pytest.raises(ConfigError, match=r"not an empty folder|is a file"):
            moeadapt.split(adapted("llama", "layer"), place)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
