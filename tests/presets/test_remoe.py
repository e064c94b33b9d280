"""`remoe`: ReLU gates."""

import pytest

from tests.presets.kit import assert_equals, expert, num, preset_layer


def test_remoe_is_the_layer_of_the_paper():
    """Wang et al. 2024 (ReMoE), https://arxiv.org/abs/2412.14711, eq. 5."""
    layer = preset_layer("remoe")
    gate, a, b = layer["router.weight"], layer["lora_A"], layer["lora_B"]

    def reference(x):
        scores = list(gate @ x)
        active = [e for e in range(8) if num(scores[e]) > 0]
        return layer.base() @ x + sum(2 * scores[e] * expert(x, a, b, e, 8) for e in active)

    assert_equals(layer, reference, "lora_A", "router.weight")


def test_its_loss_is_the_l1_norm_weighted_by_use():
    """Wang et al. 2024, eq. 10-11, and the settings of section 3.2: 1e-8, 1.2, one expert of 8."""
    layer = preset_layer("remoe")
    scores = [[max(num(s), 0.0) for s in layer["router.weight"] @ x] for x in layer.x]
    tokens, experts, k = len(scores), 8, 1
    value = 0.0
    for e in range(experts):
        use = experts / (k * tokens) * sum(own[e] > 0 for own in scores)
        value += use * sum(own[e] for own in scores) / tokens
    assert num(layer.balance("l1_sparsity")) == pytest.approx(value, rel=1e-12)
    loss = layer.config.balance_configs["l1_sparsity"]
    assert (loss.coef, loss.alpha, loss.target) == (1e-8, 1.2, k / experts)
