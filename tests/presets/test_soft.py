"""`soft`: a dense softmax mixture."""

from tests.presets.kit import assert_equals, expert, preset_layer, softmax


def test_soft_is_the_mixture_of_the_paper():
    """Jacobs et al. 1991, "Adaptive Mixtures of Local Experts", eq. 1.3: sum_e p_e o_e."""
    layer = preset_layer("soft")
    gate, a, b = layer["router.weight"], layer["lora_A"], layer["lora_B"]

    def reference(x):
        p = softmax(gate @ x)
        outputs = [layer.base() @ x + 2 * expert(x, a, b, e, rank=8) for e in range(4)]
        return sum(p[e] * outputs[e] for e in range(4))

    assert_equals(layer, reference, "lora_B", "router.weight")
    assert layer.config.balance == {}
