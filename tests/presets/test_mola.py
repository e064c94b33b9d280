"""`mola`: top-2, with more experts in higher layers."""

import pytest

from tests.presets.kit import (
    assert_equals,
    expert,
    largest,
    num,
    preset_layer,
    softmax,
    switch_loss,
)


@pytest.mark.parametrize(("depth", "experts"), [(0, 2), (1, 4), (2, 6), (3, 8)])
def test_mola_is_the_layer_of_the_paper(depth, experts):
    """Gao et al. 2024 (MoLA), https://arxiv.org/abs/2402.08562, section 3."""
    layer = preset_layer("mola", f"model.layers.{depth}.mlp.up_proj", layers=4)
    gate, a, b = layer["router.weight"], layer["lora_A"], layer["lora_B"]
    assert gate.shape[0] == experts

    def reference(x):
        p = softmax(gate @ x)
        chosen = largest(p, 2)
        total = sum(p[e] for e in chosen)
        return layer.base() @ x + 2 * sum(p[e] / total * expert(x, a, b, e, 8) for e in chosen)

    assert_equals(layer, reference, "lora_A", "router.weight")
    probs = [softmax(gate @ x) for x in layer.x]
    value = switch_loss([largest(p, 2) for p in probs], probs)
    assert num(layer.balance("switch")) == pytest.approx(value, rel=1e-12)
    assert layer.config.balance == {"switch": {"coef": 0.001}}
