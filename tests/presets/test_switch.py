"""`switch`: one FFN expert per token, weighted by its probability."""

import pytest
from torch.nn import functional as F

from tests.presets.kit import (
    assert_equals,
    expert,
    largest,
    num,
    preset_layer,
    softmax,
    switch_loss,
)

MLP = "model.layers.1.mlp"


def test_switch_is_the_layer_of_the_paper():
    """Fedus et al. 2021 (Switch Transformers), https://arxiv.org/abs/2101.03961, eq. 1-2, k = 1.

    Over a frozen FFN: p FFN_e(x) + (1 - p) FFN(x), so that untrained experts change nothing.
    """
    layer = preset_layer("switch", MLP)
    gate = layer["gate_proj.router.weight"]

    def linear(name, x, e):
        out = layer.base(name) @ x
        if e is None:
            return out
        return out + 2 * expert(x, layer[f"{name}.lora_A"], layer[f"{name}.lora_B"], e, 16)

    def ffn(x, e):
        inner = F.silu(linear("gate_proj", x, e)) * linear("up_proj", x, e)
        return linear("down_proj", inner, e)

    def reference(x):
        p = softmax(gate @ x)
        (e,) = largest(p, 1)
        return p[e] * ffn(x, e) + (1 - p[e]) * ffn(x, None)

    assert_equals(layer, reference, "down_proj.lora_B", "gate_proj.router.weight")


def test_its_balance_loss_is_the_product_of_load_and_probability():
    """Fedus et al. 2021, eq. 4-6."""
    layer = preset_layer("switch", MLP)
    probs = [softmax(layer["gate_proj.router.weight"] @ x) for x in layer.x]
    value = switch_loss([largest(p, 1) for p in probs], probs)
    assert num(layer.balance("switch")) == pytest.approx(value, rel=1e-12)
    assert layer.config.balance == {"switch": {"coef": 0.01}}
