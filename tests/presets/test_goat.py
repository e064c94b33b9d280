"""`goat`: experts that start from segments of the SVD, and the residual."""

import math

import pytest
import torch

from tests.presets.kit import (
    assert_equals,
    expert,
    largest,
    num,
    preset_layer,
    softmax,
    switch_loss,
)


def goat_layer():
    # k_proj of the tiny model has 16 outputs: 2 singular values for each of 8 experts.
    return preset_layer("goat", init_lora_weights="svd_segments", r=2)


def test_goat_is_the_layer_of_the_paper():
    """Fan et al. 2025 (GOAT), https://arxiv.org/abs/2502.16894, section 3, s = sqrt(3 n / r)."""
    layer = goat_layer()
    gate, a, b = layer["router.weight"], layer["lora_A"], layer["lora_B"]
    start_a, start_b = layer["start_A"], layer["start_B"]
    scale = math.sqrt(3 * 32 / 2)
    with torch.no_grad():
        a.add_(0.1 * torch.randn(a.shape, generator=torch.Generator().manual_seed(3)))

    def reference(x):
        p = softmax(gate @ x)
        chosen = largest(p, 2)
        total = sum(p[e] for e in chosen)
        residual = sum(expert(x, start_a, start_b, e, 2) for e in range(8)) / 8
        mixed = sum(p[e] / total * expert(x, a, b, e, 2) for e in chosen)
        return layer.base() @ x - scale * residual + scale * mixed

    layer.output = layer.module(layer.x.detach())
    assert_equals(layer, reference, "lora_A", "router.weight")


def test_expert_e_starts_from_the_largest_of_segment_e():
    """Fan et al. 2025, section 3: segments of min(m, n) / E singular values, rho = 10."""
    layer = goat_layer()
    u, s, vh = torch.linalg.svd(layer.base().detach())
    scale = math.sqrt(3 * 32 / 2)
    for e in range(8):
        expected = sum(s[i] * torch.outer(u[:, i], vh[i]) for i in (4 * e, 4 * e + 1))
        own = slice(2 * e, 2 * e + 2)
        ours = layer["lora_B"][:, own] @ layer["lora_A"][own]
        # The start is computed in float32.
        torch.testing.assert_close(ours.detach(), expected / (10 * scale), rtol=1e-4, atol=1e-6)


def test_its_balance_loss_is_the_product_of_load_and_probability():
    """Fan et al. 2025, section 3: coefficient 1e-3 in the authors' scripts."""
    layer = goat_layer()
    probs = [softmax(layer["router.weight"] @ x) for x in layer.x]
    value = switch_loss([largest(p, 2) for p in probs], probs)
    assert num(layer.balance("switch")) == pytest.approx(value, rel=1e-12)
    assert layer.config.balance == {"switch": {"coef": 0.001}}
