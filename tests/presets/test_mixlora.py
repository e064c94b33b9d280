"""`mixlora`: FFN experts of LoRA on gate, up and down, top-2."""

import pytest
import torch
from torch.nn import functional as F

from moeadapt import MoeLoraConfig
from tests.presets.kit import (
    assert_equals,
    expert,
    largest,
    num,
    preset_layer,
    softmax,
    switch_loss,
)
from tests.tiny import adapt, tiny

MLP = "model.layers.1.mlp"


def test_mixlora_is_the_layer_of_the_paper():
    """Li et al. 2024 (MixLoRA), https://arxiv.org/abs/2404.15159, section 3.1."""
    layer = preset_layer("mixlora", MLP)
    gate = layer["gate_proj.router.weight"]
    scale = 32 / 16

    def linear(name, x, e):
        a, b = layer[f"{name}.lora_A"], layer[f"{name}.lora_B"]
        return layer.base(name) @ x + scale * expert(x, a, b, e, 16)

    def ffn(x, e):
        inner = F.silu(linear("gate_proj", x, e)) * linear("up_proj", x, e)
        return linear("down_proj", inner, e)

    def reference(x):
        p = softmax(gate @ x)
        chosen = largest(p, 2)
        total = sum(p[e] for e in chosen)
        return sum(p[e] / total * ffn(x, e) for e in chosen)

    assert_equals(layer, reference, "up_proj.lora_A", "gate_proj.router.weight")


def test_its_balance_loss_is_the_product_of_load_and_probability():
    """Li et al. 2024, section 3.3, with both slots of a token counted."""
    layer = preset_layer("mixlora", MLP)
    probs = [softmax(layer["gate_proj.router.weight"] @ x) for x in layer.x]
    value = switch_loss([largest(p, 2) for p in probs], probs)
    assert num(layer.balance("switch")) == pytest.approx(value, rel=1e-12)
    assert layer.config.balance == {"switch": {"coef": 0.01}}


def test_attention_has_one_unrouted_lora():
    """Li et al. 2024, section 3.2: attention layers get LoRA of their own."""
    config = MoeLoraConfig.preset("mixlora", task_type="CAUSAL_LM", init_lora_weights=False)
    model = adapt(tiny("llama"), config).double()
    q_proj = model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
    a, b = q_proj.moeadapt_lora_A["default"].weight, q_proj.moeadapt_lora_B["default"].weight
    x = torch.randn(3, 32, dtype=torch.float64)
    expected = x @ q_proj.base_layer.weight.T + 2 * (x @ a.T @ b.T)
    assert (a.shape[0], b.shape[1]) == (16, 16)
    torch.testing.assert_close(q_proj(x), expected)
