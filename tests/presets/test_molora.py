"""`molora`: a softmax mixture of LoRA experts."""

from tests.presets.kit import assert_equals, expert, preset_layer, softmax


def test_molora_is_the_layer_of_the_paper():
    """Zadouri et al. 2023 (MoLORA), https://arxiv.org/abs/2309.05444, section 2.2, eq. 1."""
    layer = preset_layer("molora")
    gate, a, b = layer["router.weight"], layer["lora_A"], layer["lora_B"]

    def reference(x):
        s = softmax(gate @ x)
        mixed = sum(s[e] * expert(x, a, b, e, rank=4) for e in range(10))
        return layer.base() @ x + 16 / 4 * mixed

    assert_equals(layer, reference, "lora_A", "router.weight")
    assert layer.config.balance == {}
