"""`omoe`: Gram-Schmidt over the outputs of a token's experts."""

from tests.presets.kit import assert_equals, expert, preset_layer, softmax


def test_omoe_is_the_layer_of_the_paper():
    """Feng et al. 2025 (OMoE), https://arxiv.org/abs/2501.10062, section 3, vectors of own length.

    Three experts, so that the third one is made orthogonal to two.
    """
    layer = preset_layer("omoe", num_experts=3)
    gate, a, b = layer["router.weight"], layer["lora_A"], layer["lora_B"]

    def reference(x):
        w = softmax(gate @ x)
        orthogonal = []
        for e in range(3):
            u = expert(x, a, b, e, rank=16)
            for v in orthogonal:
                u = u - (u @ v) / (v @ v) * v
            orthogonal.append(u)
        return layer.base() @ x + 2 * sum(w[e] * orthogonal[e] for e in range(3))

    assert_equals(layer, reference, "lora_A", "lora_B", "router.weight")
