"""Every targeting field picks what PEFT's LoRA picks."""

import re
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel

from moeadapt.errors import ConfigError
from tests.tiny import MODELS, adapt, adapted, batch, gradients, logits, moe_config, tiny

FIELDS: dict[str, dict[str, Any]] = {
    "list": {"target_modules": ["q_proj", "down_proj"]},
    "set": {"target_modules": {"q_proj", "down_proj"}},
    "full path": {"target_modules": ["model.layers.1.mlp.up_proj"]},
    "regex": {"target_modules": r".*\.1\.mlp\.(up|down)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "ALL-LINEAR": {"target_modules": "ALL-LINEAR"},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "exclude list": {"target_modules": "all-linear", "exclude_modules": ["down_proj", "o_proj"]},
    "exclude regex": {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"},
    "exclude path": {
        "target_modules": ["q_proj"],
        "exclude_modules": ["model.layers.0.self_attn.q_proj"],
    },
    "one layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "pattern": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [0],
        "layers_pattern": "layers",
    },
    "patterns": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [0],
        "layers_pattern": ["blocks", "layers"],
    },
    "saved in full": {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["up_proj"]},
}


def _targets(config: Any) -> list[str]:
    return adapt(tiny("llama"), config).base_model.targeted_module_names


@pytest.mark.parametrize("scope", ["layer", "block"])
@pytest.mark.parametrize("fields", list(FIELDS.values()), ids=list(FIELDS))
def test_targets_are_what_lora_targets(fields: dict[str, Any], scope: str) -> None:
    expected = _targets(LoraConfig(task_type="CAUSAL_LM", **fields))
    assert expected
    assert _targets(moe_config(scope, **fields)) == expected


@pytest.mark.parametrize("name", sorted(MODELS))
def test_without_target_modules_an_architecture_has_loras_defaults(name: str) -> None:
    theirs = adapt(tiny(name), LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=name == "gpt2"))
    ours = adapt(tiny(name), moe_config("layer", target_modules=None))
    assert ours.base_model.targeted_module_names == theirs.base_model.targeted_module_names


@pytest.mark.parametrize("kind", ["layer", "block", "ffn"])
def test_layers_left_out_stay_bitwise_the_base(kind: str) -> None:
    names = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    model = adapted("llama", kind, target_modules=names, layers_to_transform=[1])
    hidden = [m(**batch(), output_hidden_states=True).hidden_states for m in (model, tiny("llama"))]
    assert torch.equal(hidden[0][1], hidden[1][1])
    assert not torch.equal(hidden[0][2], hidden[1][2])


@pytest.mark.parametrize("targets", ["all-linear", r".*q_proj"])
@pytest.mark.parametrize("more", [{}, {"layers_pattern": "layers"}])
def test_layers_to_transform_needs_a_list_as_for_lora(targets: str, more: dict[str, str]) -> None:
    fields = {"target_modules": targets, "layers_to_transform": [1], **more}
    with pytest.raises(ValueError, match="layers_to_transform"):
        LoraConfig(**fields)
    with pytest.raises(ConfigError, match="layers_to_transform.*a list"):
        moe_config("layer", **fields)


def test_layers_pattern_needs_layers_to_transform_as_for_lora() -> None:
    with pytest.raises(ValueError, match="layers_pattern"):
        LoraConfig(target_modules=["q_proj"], layers_pattern="layers")
    with pytest.raises(ConfigError, match="layers_pattern"):
        moe_config("layer", target_modules=["q_proj"], layers_pattern="layers")


def test_a_rank_pattern_sets_the_rank_of_one_expert() -> None:
    model = adapted("llama", "layer", rank_pattern={"down_proj": 2, r".*\.0\.mlp\.up_proj": 3})
    ranks = {n: p.shape[0] / 4 for n, p in model.named_parameters() if "lora_A" in n}
    for name, rank in ranks.items():
        expected = 2 if "down_proj" in name else 3 if re.search(r"\.0\.mlp\.up", name) else 4
        assert rank == expected


def test_a_pattern_that_matches_nothing_warns_as_for_lora() -> None:
    with pytest.warns(RuntimeWarning, match="rank_pattern keys did not match.*nonsense"):
        adapted("llama", "layer", rank_pattern={"nonsense": 2})


@pytest.mark.parametrize("indices", [[5, 6], {"embed_tokens": [5, 6]}], ids=["list", "dict"])
def test_chosen_token_embeddings_train_and_travel(indices: Any, tmp_path) -> None:
    model = adapted("llama", "ffn", trainable_token_indices=indices)
    (name,) = [n for n, _ in model.named_parameters() if "trainable_tokens_delta" in n]
    inputs = {k: v.clone() for k, v in batch().items()}
    inputs["input_ids"][0, :2] = torch.tensor([5, 6])
    assert gradients(model, inputs)[name].abs().min() > 0
    with torch.no_grad():
        model.get_parameter(name).add_(1)
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), str(tmp_path)).eval()
    assert torch.equal(logits(loaded, inputs), expected)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded, inputs), logits(tiny("llama"), inputs))


def test_the_head_can_be_a_target_in_every_scope() -> None:
    for kind in ("layer", "block"):
        model = adapted("llama", kind, target_modules=["lm_head"])
        assert not torch.allclose(logits(model, batch()), logits(tiny("llama"), batch()))
