"""`mov`: a softmax mixture of scaling vectors."""

from tests.presets.kit import assert_equals, preset_layer, softmax


def test_mov_is_the_layer_of_the_paper():
    """Zadouri et al. 2023 (MoV), https://arxiv.org/abs/2309.05444, section 2.2: l = sum_e s_e l_e.

    Vectors are kept as l_e - 1.
    """
    layer = preset_layer("mov")
    gate, scales = layer["router.weight"], layer["ia3_scale"]

    def reference(x):
        s = softmax(gate @ x)
        vectors = [1 + scales[:, e] for e in range(10)]
        return sum(s[e] * vectors[e] for e in range(10)) * (layer.base() @ x)

    assert_equals(layer, reference, "ia3_scale", "router.weight")
    assert layer.config.target_modules == {"k_proj", "v_proj", "up_proj"}
