"""`loramoe`: a softmax mixture of LoRA experts on the FFN."""

from tests.presets.kit import assert_equals, expert, preset_layer, softmax


def test_loramoe_is_the_layer_of_the_paper():
    """Dou et al. 2023 (LoRAMoE), https://arxiv.org/abs/2312.09979, section 3."""
    layer = preset_layer("loramoe")
    gate, a, b = layer["router.weight"], layer["lora_A"], layer["lora_B"]

    def reference(x):
        w = softmax(gate @ x)
        return layer.base() @ x + 32 / 4 * sum(w[i] * expert(x, a, b, i, 4) for i in range(6))

    assert_equals(layer, reference, "lora_A", "router.weight")
    assert layer.config.target_modules == {"gate_proj", "up_proj", "down_proj"}
