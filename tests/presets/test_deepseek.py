"""`deepseek`: fine-grained experts, a shared one, sigmoid scores with a selection bias."""

from tests.presets.kit import assert_equals, expert, largest, preset_layer


def test_deepseek_is_the_layer_of_the_papers():
    """DeepSeekMoE, https://arxiv.org/abs/2401.06066, eq. 9-11; DeepSeek-V3, eq. 12-16.

    4 experts of rank 16 cut into 16 of rank 4, of which 4 are used, beside a shared one of rank 16.
    """
    layer = preset_layer("deepseek")
    gate, bias = layer["router.weight"], layer["router.selection_bias"]
    a, b = layer["lora_A"], layer["lora_B"]

    def reference(x):
        s = [score.sigmoid() for score in gate @ x]
        chosen = largest([s[e] + bias[e] for e in range(16)], 4)
        total = sum(s[e] for e in chosen)
        out = layer.base() @ x + 2 * expert(x, a, b, 4, rank=16)
        return out + 2 * sum(s[e] / total * expert(x, a, b, e, rank=4) for e in chosen)

    assert_equals(layer, reference, "lora_A", "router.weight")
    assert layer.config.balance_configs["loss_free"].rate == 0.001
