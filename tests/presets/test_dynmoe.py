"""`dynmoe`: every live expert whose similarity passes its threshold, used equally."""

import pytest

from tests.presets.kit import assert_equals, expert, largest, num, preset_layer


def scores_of(layer, x):
    gate, threshold = layer["router.weight"], layer["router.threshold"]
    scores, margins = [], []
    for e in range(4):
        cosine = (gate[e] / gate[e].norm()) @ (x / x.norm())
        scores.append(cosine.sigmoid())
        margins.append(cosine.sigmoid() - threshold[e].sigmoid())
    return scores, margins


def test_dynmoe_is_the_layer_of_the_paper():
    """Guo et al. 2024 (DynMoE), https://arxiv.org/abs/2405.14297, eq. 4-6; 4 of 8 experts on.

    The step has the straight-through gradient of the margin; a token that passes no threshold
    uses its most similar expert.
    """
    layer = preset_layer("dynmoe")
    a, b = layer["lora_A"], layer["lora_B"]

    def reference(x):
        scores, margins = scores_of(layer, x)
        chosen = [e for e in range(4) if num(margins[e]) > 0] or largest(scores, 1)
        out = layer.base() @ x
        for e in chosen:
            step = 1 + margins[e] - margins[e].detach()
            out = out + step / len(chosen) * 2 * expert(x, a, b, e, rank=8)
        return out

    assert_equals(layer, reference, "lora_A", "router.weight")


def test_its_loss_asks_for_orthonormal_embeddings():
    """Guo et al. 2024, the diversity loss of section 3, with the sum of absolute entries."""
    layer = preset_layer("dynmoe")
    gate = layer["router.weight"]
    value = sum(abs(num(gate[i] @ gate[j]) - (i == j)) for i in range(8) for j in range(8))
    assert num(layer.balance("simbal")) == pytest.approx(value, rel=1e-12)
