"""`hydralora`: one A, a B per expert."""

from tests.presets.kit import assert_equals, preset_layer, softmax


def test_hydralora_is_the_layer_of_the_paper():
    """Tian et al. 2024 (HydraLoRA), https://arxiv.org/abs/2404.19245, eq. 6."""
    layer = preset_layer("hydralora")
    gate, a, b = layer["router.weight"], layer["lora_A"], layer["lora_B"]
    assert a.shape[0] == 4

    def reference(x):
        w = softmax(gate @ x)
        heads = [b[:, 4 * i : 4 * i + 4] @ (a @ x) for i in range(3)]
        return layer.base() @ x + 32 / 4 * sum(w[i] * heads[i] for i in range(3))

    assert_equals(layer, reference, "lora_A", "router.weight")
    assert layer.config.target_modules == {"gate_proj", "up_proj", "down_proj"}
