"""`adamole`: probabilities above a learned threshold, renormalised."""

import pytest

from tests.presets.kit import assert_equals, expert, num, preset_layer, softmax, switch_loss

Q_PROJ = "model.layers.1.self_attn.q_proj"


def weights_of(layer, x):
    tau = (layer["router.tau_weight"][0] @ x + layer["router.tau_bias"][0]).sigmoid() / 8
    above = [p - tau for p in softmax(layer["router.weight"] @ x)]
    kept = [value if num(value) > 0 else None for value in above]
    total = sum(value for value in kept if value is not None)
    return [None if value is None else value / total for value in kept]


def test_adamole_is_the_layer_of_the_paper():
    """Liu and Luo 2024 (AdaMoLE), https://arxiv.org/abs/2405.00361, eq. 5-7, tau_max = 1 / E."""
    layer = preset_layer("adamole", Q_PROJ)
    a, b = layer["lora_A"], layer["lora_B"]

    def reference(x):
        w = weights_of(layer, x)
        active = [e for e in range(8) if w[e] is not None]
        return layer.base() @ x + 16 / 4 * sum(w[e] * expert(x, a, b, e, 4) for e in active)

    assert_equals(layer, reference, "lora_A", "router.weight", "router.tau_weight")


def test_its_balance_loss_is_the_product_of_load_and_probability():
    """Liu and Luo 2024, section 3: the Switch loss over the experts that pass."""
    layer = preset_layer("adamole", Q_PROJ)
    probs = [softmax(layer["router.weight"] @ x) for x in layer.x]
    chosen = [[e for e, w in enumerate(weights_of(layer, x)) if w is not None] for x in layer.x]
    assert len({len(own) for own in chosen}) > 1
    value = switch_loss(chosen, probs)
    assert num(layer.balance("switch")) == pytest.approx(value, rel=1e-12)
    assert layer.config.balance == {"switch": {"coef": 0.001}}
