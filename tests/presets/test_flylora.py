"""`flylora`: the largest entries of A x choose the ranks."""

from tests.presets.kit import assert_equals, largest, preset_layer


def test_flylora_is_the_layer_of_the_paper():
    """Zou et al. 2025 (FlyLoRA), https://arxiv.org/abs/2510.08396, section 3: r = 32, k = 8."""
    layer = preset_layer("flylora")
    a, b = layer["lora_A"], layer["lora_B"]
    alpha = 2 * 32

    def reference(x):
        y = a.detach() @ x
        chosen = largest([abs(value) for value in y], 8)
        return layer.base() @ x + alpha / 32 * sum(y[i] * b[:, i] for i in chosen)

    assert_equals(layer, reference, "lora_B")


def test_its_a_is_frozen_and_sparse():
    """Zou et al. 2025, section 3: as many nonzero entries in each row, a share k / r of them."""
    a = preset_layer("flylora")["lora_A"]
    assert not a.requires_grad
    assert {int((row != 0).sum()) for row in a} == {32 * 8 // 32}
