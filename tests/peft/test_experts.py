"""Expert types, numbers of experts and granularity in a model: saving, counting, refusing."""

import json
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from moeadapt import MoeLoraConfig
from moeadapt.errors import ConfigError
from moeadapt.tuner import MoeLoraLinear
from moeadapt.tuner.context import find_context
from tests.tiny import (
    HIDDEN,
    LORA_KINDS,
    adapted,
    batch,
    gradients,
    logits,
    moe_config,
    tiny,
)

ROUTER = {"name": "top_k", "k": 2, "init_std": 0.5}
TYPES: dict[str, dict[str, Any]] = {
    "lora": {},
    "shared_a": {"experts": "shared_a"},
    "shared_b": {"experts": "shared_b"},
    "ia3": {"experts": "ia3"},
    "rank1": {"experts": "rank1", "router": {"name": "rank_wise", "k": 5, "init_std": 0.5}},
    "heterogeneous": {
        "experts": {"name": "heterogeneous", "ranks": [1, 2, 3, 6]},
        "router": {**ROUTER, "cost_aware": 0.5},
    },
    "random_a": {"experts": {"name": "random_a", "k": 3}, "router": "uniform"},
    "orthogonalize": {"experts": {"name": "lora", "orthogonalize": True}},
    "granularity": {"granularity": 2},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pattern": {"experts_pattern": [2, 5]},
    "svd_segments": {"init_lora_weights": "svd_segments", "r": 2},
}
CASES = [
    (name, kind)
    for name in TYPES
    for kind in LORA_KINDS
    if kind != "ffn" or name not in ("ia3", "orthogonalize")
]
cases = pytest.mark.parametrize(("name", "kind"), CASES)


def layers(model: nn.Module) -> dict[str, MoeLoraLinear]:
    return {m.moe_plans["default"].key: m for m in model.modules() if isinstance(m, MoeLoraLinear)}


@cases
def test_an_adapter_is_the_same_after_saving_and_loading(name, kind, tmp_path):
    model = adapted("llama", kind, n_shared=1, **TYPES[name])
    expected = logits(model, batch())
    if name != "orthogonal":
        assert not torch.allclose(expected, logits(tiny("llama"), batch()), rtol=1e-2, atol=1e-2)
    model.save_pretrained(tmp_path)
    for fields in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path, **fields).eval()
        assert torch.equal(logits(loaded, batch()), expected)


@cases
def test_a_fresh_adapter_changes_nothing_and_learns(name, kind):
    fields = {"init_lora_weights": True, **TYPES[name]}
    model, inputs = adapted("llama", kind, **fields), batch()
    if name != "svd_segments":
        torch.testing.assert_close(
            logits(model, inputs), logits(tiny("llama"), inputs), rtol=0, atol=1e-5
        )
    grads = gradients(model.train(), inputs)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert grads.keys() == trained
    assert all(g.isfinite().all() for g in grads.values())
    assert any(g.any() for n, g in grads.items() if "router" not in n)


def test_what_is_frozen_is_saved_and_never_trained(tmp_path):
    for name, frozen in (("random_a", {"lora_A"}), ("svd_segments", {"start_A", "start_B"})):
        model = adapted("llama", "layer", **TYPES[name])
        model.set_adapter("default")
        model.base_model.set_requires_grad("default", True)
        still = {
            n.split("moeadapt_")[1].split(".")[0]
            for n, p in model.named_parameters()
            if "moeadapt_" in n and not p.requires_grad
        }
        assert still == frozen
        model.save_pretrained(tmp_path / name)
        from safetensors.torch import load_file

        names = load_file(tmp_path / name / "adapter_model.safetensors")
        for word in frozen:
            assert any(f"moeadapt_{word}" in n for n in names)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("lora", lambda i, o: 4 * 4 * (i + o)),
        ("shared_a", lambda i, o: 4 * i + 4 * 4 * o),
        ("shared_b", lambda i, o: 4 * 4 * i + 4 * o),
        ("ia3", lambda i, o: 4 * o),
        ("rank1", lambda i, o: 4 * 4 * (i + o)),
        ("heterogeneous", lambda i, o: 12 * (i + o)),
        ("random_a", lambda i, o: 4 * 4 * (i + o)),
        ("granularity", lambda i, o: 4 * 4 * (i + o)),
    ],
)
def test_a_layer_has_the_parameters_of_the_catalogue(name, count):
    for layer in layers(adapted("llama", "layer", **TYPES[name])).values():
        bank = layer.moe_banks["default"]
        found = sum(bank.factor(n).weight.numel() for n in bank.factor_names)
        assert found == count(layer.in_features, layer.out_features)


def test_rank1_routes_every_rank():
    model = adapted("llama", "layer", **TYPES["rank1"])
    for layer in layers(model).values():
        head = layer.moe_heads["default"]
        assert head.router.num_experts == 16
        assert head.router.max_active == 5
        assert layer.moe_banks["default"].size.scale == 8 / 4


def test_granularity_cuts_experts_and_multiplies_k():
    model = adapted("llama", "block", granularity=2, n_shared=1)
    for layer in layers(model).values():
        size = layer.moe_banks["default"].size
        assert (size.num_experts, size.num_shared, size.rank, size.scale) == (8, 2, 2, 2.0)
    owner = next(m for m in layers(model).values() if "default" in m.moe_heads)
    assert owner.moe_heads["default"].router.max_active == 4


def test_the_costs_of_uneven_experts_reach_the_router():
    layer = next(iter(layers(adapted("llama", "layer", **TYPES["heterogeneous"])).values()))
    assert layer.moe_heads["default"].router.costs == (1 / 6, 2 / 6, 3 / 6, 1.0)


# --- numbers of experts per layer


def counts(model: nn.Module) -> dict[str, int]:
    return {key: m.moe_banks["default"].size.num_experts for key, m in layers(model).items()}


def test_a_list_divides_the_depth_into_equal_groups():
    base = tiny("llama")
    base.model.layers.extend(tiny("llama", seed=1).model.layers)
    for i, layer in enumerate(base.model.layers):
        layer.self_attn.layer_idx = i
    model = get_peft_model(base, moe_config("block", experts_pattern=[2, 6]))
    assert {int(k.split(".")[2]): n for k, n in counts(model).items()} == {0: 2, 1: 2, 2: 6, 3: 6}


def test_a_mapping_names_modules_as_rank_pattern_does():
    pattern = {"q_proj": 3, r"layers\.1\.mlp\..*": 2}
    found = counts(adapted("llama", "layer", experts_pattern=pattern))
    for key, number in found.items():
        q, late = key.endswith("q_proj"), "layers.1.mlp" in key
        assert number == (3 if q else 2 if late else 4), key


@pytest.mark.parametrize("pattern", [[2, 4], {"q_proj": 2}, None])
def test_the_pattern_survives_json(pattern, tmp_path):
    config = moe_config("layer", experts_pattern=pattern, granularity=2)
    config.save_pretrained(tmp_path)
    text = json.loads((tmp_path / "adapter_config.json").read_text())
    assert text["experts_pattern"] == pattern
    again = MoeLoraConfig.from_pretrained(tmp_path)
    assert (again.experts_pattern, again.granularity) == (pattern, 2)


# --- refusals


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "ia3 ffn": ({"experts": "ia3", "placement": "ffn"}, "'ia3' do not work with placement='ffn'"),
    "omoe ffn": (
        {"experts": {"name": "lora", "orthogonalize": True}, "placement": "ffn"},
        "orthogonalize=True compares",
    ),
    "ia3 dropout": ({"experts": "ia3", "lora_dropout": 0.1}, "lora_dropout=0.1 has no effect"),
    "ia3 orthogonal": (
        {"experts": "ia3", "init_lora_weights": "orthogonal"},
        r"init_lora_weights='orthogonal' does not go with experts 'ia3'; use one of .*'lora'",
    ),
    "svd of shared": (
        {"experts": "shared_a", "init_lora_weights": "svd_segments"},
        "use experts='lora' without options",
    ),
    "ranks": (
        {"experts": {"name": "heterogeneous", "ranks": [1, 2]}, "num_experts": 3},
        "lists 2 experts, but there are 3",
    ),
    "ranks of a pattern": (
        {"experts": {"name": "heterogeneous", "ranks": [1, 2]}, "experts_pattern": [2, 4]},
        "lists 2 experts, but there are 4",
    ),
    "k of a list": ({"experts_pattern": [1, 2]}, "k=2 is larger than num_experts=1"),
    "k of a mapping": ({"experts_pattern": {"q_proj": 1}}, "k=2 is larger than num_experts=1"),
    "empty": ({"experts_pattern": {}}, "experts_pattern={} is empty"),
    "zero": ({"experts_pattern": [0]}, "experts_pattern="),
    "no divisor": ({"granularity": 3}, "granularity=3 does not divide the rank 4"),
    "no k": ({"granularity": 2, "router": "soft"}, "'soft' has no k that could be multiplied"),
    "fixed k": ({"granularity": 2, "router": "switch"}, "'switch' has no k"),
    "cut twice": ({"granularity": 2, "experts": "rank1"}, "does not go with experts 'rank1'"),
    "scheduled k": (
        {"granularity": 2, "schedule": {"k": {"start": 4, "end": 2, "steps": 3}}},
        "granularity=2 multiplies the router's k",
    ),
    "random_a": ({"experts": {"name": "random_a", "k": 17}}, "k=17 is larger than the 16 ranks"),
}


@pytest.mark.parametrize(("fields", "message"), list(SETTINGS.values()), ids=list(SETTINGS))
def test_settings_that_contradict_each_other_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        moe_config("layer", **fields)


TARGETS: dict[str, tuple[str, dict[str, Any], str]] = {
    "depth": ("layer", {"experts_pattern": [2, 2, 4]}, r"3 groups.*do not divide the 2 layers"),
    "block counts": (
        "block",
        {"experts_pattern": {"q_proj": 3}},
        r"'model.layers.0.self_attn' share one routing but would have different numbers",
    ),
    "block ranks": (
        "block",
        {"experts": "rank1", "rank_pattern": {"up_proj": 2}},
        r"'model.layers.0.mlp' share one routing.*one rank in rank_pattern",
    ),
    "rank of a pattern": (
        "layer",
        {"granularity": 4, "rank_pattern": {"q_proj": 2}},
        "granularity=4 does not divide the rank 2",
    ),
    "k of a rank": (
        "layer",
        {"experts": "rank1", "rank_pattern": {"q_proj": 1}, "router": {"name": "rank_wise"}},
        "k=8 is larger than num_experts=4",
    ),
    "loss of the experts": (
        "layer",
        {"experts": "ia3", "balance": {"orthogonal": 0.1}},
        "orthogonal.*ia3|ia3.*orthogonal|Ia3",
    ),
    "segments": (
        "layer",
        {"init_lora_weights": "svd_segments", "r": 5},
        r"'model.layers.0.self_attn.k_proj' is 32 -> 16.*has 4 singular values.*rank 5",
    ),
}


@pytest.mark.parametrize(("kind", "fields", "message"), list(TARGETS.values()), ids=list(TARGETS))
def test_sizes_that_do_not_fit_leave_the_base_untouched(kind, fields, message):
    base = tiny("llama")
    types = [(n, type(m)) for n, m in base.named_modules()]
    with pytest.raises(ConfigError, match=message):
        get_peft_model(base, moe_config(kind, **fields))
    assert [(n, type(m)) for n, m in base.named_modules()] == types
    assert find_context(base) is None


def test_a_rank_pattern_under_one_routing_is_fine_where_the_counts_agree():
    model = adapted("llama", "block", rank_pattern={"up_proj": 2})
    assert set(counts(model).values()) == {4}
    assert logits(model, batch()).isfinite().all()


def test_ia3_scales_a_conv1d_bias_and_all():
    base = tiny("gpt2")
    model = get_peft_model(base, moe_config("layer", experts="ia3", init_lora_weights=True))
    layer = next(iter(layers(model).values()))
    x = torch.randn(3, HIDDEN)
    layer.moeadapt_ia3_scale["default"].weight.data.fill_(0.5)
    torch.testing.assert_close(layer(x), 1.5 * layer.base_layer(x))
