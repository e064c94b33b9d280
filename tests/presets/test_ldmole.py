"""`ldmole`: Sparsegen weights with a predicted sparsity."""

import pytest

from tests.presets.kit import assert_equals, expert, num, preset_layer, softmax, switch_loss


def weights_of(layer, x):
    """Find the support by trying every size, largest scores first."""
    u = list(layer["router.weight"] @ x)
    spread = (layer["router.spread_weight"][0] @ x + layer["router.spread_bias"][0]).exp()
    spread = 0.001 + (1 + spread).log()  # 1 - lambda, kept above 0.001
    order = sorted(range(len(u)), key=lambda e: -num(u[e]))
    size = max(
        k
        for k in range(1, len(u) + 1)
        if num(spread + k * u[order[k - 1]] - sum(u[e] for e in order[:k])) > 0
    )
    tau = (sum(u[e] for e in order[:size]) - spread) / size
    return {e: (u[e] - tau) / spread for e in order[:size]}


def test_ldmole_is_the_layer_of_the_paper():
    """Zhuang et al. 2025 (LD-MoLE), https://arxiv.org/abs/2509.25684, proposition 1."""
    layer = preset_layer("ldmole")
    a, b = layer["lora_A"], layer["lora_B"]

    def reference(x):
        w = weights_of(layer, x)
        assert num(sum(w.values())) == pytest.approx(1)
        return layer.base() @ x + 2 * sum(w[e] * expert(x, a, b, e, 8) for e in w)

    assert_equals(layer, reference, "lora_B", "router.weight", "router.spread_weight")


def test_its_balance_loss_is_the_product_of_load_and_probability():
    """Zhuang et al. 2025, section 3: the Switch loss over the experts in the support."""
    layer = preset_layer("ldmole")
    probs = [softmax(layer["router.weight"] @ x) for x in layer.x]
    value = switch_loss([list(weights_of(layer, x)) for x in layer.x], probs)
    assert num(layer.balance("switch")) == pytest.approx(value, rel=1e-12)
    assert layer.config.balance == {"switch": {"coef": 1.0}}
