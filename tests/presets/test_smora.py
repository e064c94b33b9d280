"""`smora`: every rank is an expert."""

import pytest

from tests.presets.kit import assert_equals, largest, preset_layer, softmax


def test_smora_is_the_layer_of_the_paper():
    """Zhao et al. 2025 (SMoRA), https://arxiv.org/abs/2501.15103, eq. 7-9: 8 of 64 ranks."""
    layer = preset_layer("smora")
    gate, bias = layer["router.weight"], layer["router.selection_bias"]
    a, b = layer["lora_A"], layer["lora_B"]
    assert gate.shape[0] == a.shape[0] == 64

    def reference(x):
        p = softmax(gate @ x)
        chosen = largest([p[i] + bias[i] for i in range(64)], 8)
        total = sum(p[i] for i in chosen)
        mixed = sum(p[i] / total * (a[i] @ x) * b[:, i] for i in chosen)
        return layer.base() @ x + 16 / 8 * mixed

    assert_equals(layer, reference, "lora_A", "router.weight")
    assert layer.config.balance_configs["loss_free"].rate == pytest.approx(0.001)
