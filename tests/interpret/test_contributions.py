"""Contributions are what the model really adds, and what it really loses."""

import pytest
from torch.testing import assert_close

import moeadapt
from moeadapt.errors import ConfigError
from moeadapt.interpret import contributions
from moeadapt.interpret.scope import choose_layers
from tests.interpret.kit import KINDS, model_of, zeroed
from tests.tiny import batch, logits

IDS, MASK = batch().values()
REAL = MASK.bool()
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def models():
    return {kind: model_of(kind) for kind in KINDS}


def output_of(model, module, **override):
    """Return what `module` answers while the model runs."""
    kept = []
    handle = model.get_submodule(module).register_forward_hook(lambda *a: kept.append(a[-1]))
    with moeadapt.override_routing(model, **override):
        logits(model, batch())
    handle.remove()
    return kept[0]


def own_weights(_, routing):
    return routing.expert_weights


READS_INPUT = {
    "layer": ["model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"],
    "block": ["model.layers.1.mlp.up_proj", "model.layers.0.self_attn.v_proj"],
    "ffn": ["model.layers.1.mlp"],
    "glu": ["model.layers.1.mlp.down_proj"],
}


def check_norms(model, kind):
    """Compare with the difference of two outputs, with and without the expert."""
    found = contributions(model, IDS, MASK, effects=False)
    norms = {key: (name, x) for name, own in found.layers.items() for key, x in own.norms.items()}
    for linear in READS_INPUT[kind]:
        layer, measured = norms[linear]
        module = f"base_model.model.{linear}"
        whole = output_of(model, module, edit=own_weights)
        for expert in range(4):
            rest = output_of(model, module, edit=zeroed([expert], [layer]))
            assert_close(measured[..., expert][REAL], (whole - rest).norm(dim=-1)[REAL])
        assert measured[REAL].max() > 0
        assert measured[~REAL].isnan().all()


@kinds
def test_norms_are_what_is_missing_from_the_output_without_the_expert(kind, models):
    check_norms(models[kind], kind)


def test_norms_of_experts_that_scale_the_base_output():
    check_norms(model_of("layer", experts="ia3"), "layer")


def test_norms_of_an_ffn_are_those_of_the_expert_alone(models):
    """With weight 1 the FFN answers FFN_e(x), with weight 0 FFN(x)."""
    model, layer = models["ffn"], "model.layers.0.mlp"
    own = contributions(model, IDS, MASK, effects=False).layers[layer]
    base = output_of(model, f"base_model.model.{layer}", edit=zeroed(range(4)))
    for expert in range(4):
        alone = output_of(model, f"base_model.model.{layer}", force=expert)
        expected = own.weights[..., expert] * (alone - base).norm(dim=-1)
        assert_close(own.norms[layer][..., expert][REAL], expected[REAL])


def test_norms_of_linears_are_those_of_their_matrices(models):
    model = models["layer"]
    name = "model.layers.0.mlp.gate_proj"
    module = model.get_submodule(f"base_model.model.{name}")
    seen = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    own = contributions(model, IDS, MASK, layers=[name], effects=False).layers[name]
    handle.remove()
    for expert in range(4):
        delta = seen[0] @ module.moe_banks["default"].delta_weight(expert).T
        expected = own.weights[..., expert] * delta.norm(dim=-1)
        assert_close(own.norms[name][..., expert][REAL], expected[REAL])


@kinds
def test_changes_are_log_probabilities_without_the_expert(kind, models):
    model = models[kind]
    layer = list(choose_layers(model))[-1]
    found = contributions(model, IDS, MASK, layers=[layer], experts=[2, 0])
    assert list(found.layers) == [layer]
    own = found.layers[layer]
    assert own.experts == (2, 0)
    raw = logits(model, batch())
    before = raw.log_softmax(-1)
    for column, expert in enumerate(own.experts):
        with moeadapt.override_routing(model, edit=zeroed([expert], [layer])):
            raw_after = logits(model, batch())
            after = raw_after.log_softmax(-1)
        for row in range(3):
            for t in range(9):
                change = own.logprob_change[row, t, column]
                if t == 8 or not REAL[row, t]:
                    assert change.isnan()
                    assert own.logit_change[row, t, column].isnan()
                    assert found.logprob[row, t].isnan()
                    assert found.logit[row, t].isnan()
                    continue
                word = IDS[row, t + 1]
                assert_close(change, after[row, t, word] - before[row, t, word])
                assert_close(found.logprob[row, t], before[row, t, word])
                lost = raw_after[row, t, word] - raw[row, t, word]
                assert_close(own.logit_change[row, t, column], lost)
                assert_close(found.logit[row, t], raw[row, t, word])
        assert own.logprob_change[..., column][REAL].nan_to_num().abs().max() > 1e-6


@kinds
def test_padding_does_not_matter(kind, models):
    model = models[kind]
    layer = next(iter(choose_layers(model)))
    padded = contributions(model, IDS, MASK, layers=[layer])
    alone = contributions(model, IDS[1:2, 2:], layers=[layer])
    # Positions are rotated in float32.
    close = {"rtol": 1e-4, "atol": 1e-5, "equal_nan": True}
    assert_close(padded.logprob[1, 2:], alone.logprob[0], **close)
    mine, theirs = padded.layers[layer], alone.layers[layer]
    assert_close(mine.logprob_change[1, 2:], theirs.logprob_change[0], **close)
    for name, norms in mine.norms.items():
        assert_close(norms[1, 2:], theirs.norms[name][0], **close)


def test_without_effects_nothing_is_removed(models):
    found = contributions(models["layer"], IDS, MASK, effects=False)
    assert all(own.logprob_change is None for own in found.layers.values())
    assert all(own.logit_change is None for own in found.layers.values())


def test_an_expert_that_some_layer_lacks_is_left_out_there():
    model = model_of(
        "block",
        experts_pattern={f"model.layers.0.mlp.{name}_proj": 2 for name in ("gate", "up", "down")},
    )
    found = contributions(model, IDS, MASK, experts=[3])
    columns = {name: own.experts for name, own in found.layers.items()}
    assert columns["model.layers.0.mlp"] == ()
    assert columns["model.layers.1.mlp"] == (3,)


def test_a_mask_of_another_shape_is_refused(models):
    with pytest.raises(ConfigError, match=r"attention_mask has the shape \(3, 8\)"):
        contributions(models["layer"], IDS, MASK[:, 1:])
