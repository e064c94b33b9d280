"""`adamoe`: top-3 of four experts and four null experts."""

import pytest

from tests.presets.kit import assert_equals, expert, largest, num, preset_layer, softmax


def test_adamoe_is_the_layer_of_the_paper():
    """Zeng et al. 2024 (AdaMoE), https://arxiv.org/abs/2406.13233, section 3.

    Null experts are chosen like the others; the weights of the true ones are normalised among
    themselves.
    """
    layer = preset_layer("adamoe")
    gate, a, b = layer["router.weight"], layer["lora_A"], layer["lora_B"]
    assert gate.shape[0] == 8

    def reference(x):
        p = softmax(gate @ x)
        true = [e for e in largest(p, 3) if e < 4]
        total = sum(p[e] for e in true)
        return layer.base() @ x + sum(2 * p[e] / total * expert(x, a, b, e, 8) for e in true)

    assert_equals(layer, reference, "lora_A", "router.weight")
    counts = {sum(e < 4 for e in largest(softmax(gate @ x), 3)) for x in layer.x}
    assert len(counts) > 1


def test_its_balance_loss_gives_null_experts_their_average_load():
    """Zeng et al. 2024, section 3."""
    layer = preset_layer("adamoe")
    probs = [softmax(layer["router.weight"] @ x) for x in layer.x]
    chosen = [largest(p, 3) for p in probs]
    share = [sum(e in own for own in chosen) / (3 * len(chosen)) for e in range(8)]
    share = share[:4] + [sum(share[4:]) / 4] * 4
    mean = [sum(num(p[e]) for p in probs) / len(probs) for e in range(8)]
    value = 8 * sum(f * p for f, p in zip(share, mean, strict=True))
    assert num(layer.balance("switch")) == pytest.approx(value, rel=1e-12)
    assert layer.config.balance == {"switch": {"coef": 0.001}}
