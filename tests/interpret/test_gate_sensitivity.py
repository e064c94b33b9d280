"""Derivatives are slopes, and noise moves tokens."""

import pytest
import torch

import moeadapt
from moeadapt.errors import ConfigError
from moeadapt.interpret import gate_sensitivity
from moeadapt.interpret.scope import choose_layers
from tests.interpret.kit import (
    KINDS,
    items,
    model_of,
    model_with_idle_expert,
    token_losses,
)

STEP = 2e-3
"""The norms of a Llama are computed in float32 whatever its type."""


def small(item):
    """Return two rows of four tokens, the first of the second row padding."""
    rows = {name: item[name][:2, -4:].clone() for name in ("input_ids", "attention_mask")}
    rows["attention_mask"][1, :1] = 0
    return rows


def summed(model, item, layer, token, expert, step):
    """Return the summed loss when one weight of one token is moved."""

    def edit(name, routing):
        weights = routing.expert_weights.clone()
        if name == layer:
            weights[token, expert] += step
        return weights

    return sum(map(sum, token_losses(model, item, edit=edit)))


def check_slopes(model, layer):
    """Compare with finite differences; a later router must not jump."""
    item = small(items(1)[0])
    everything = gate_sensitivity(model, [item], noise=())
    found = gate_sensitivity(model, [item], noise=(), layers=[layer])
    assert list(found.rms) == [layer]
    assert found.rms[layer] == pytest.approx(everything.rms[layer])
    real = item["attention_mask"].flatten().nonzero().flatten().tolist()
    expert = 3
    slopes = [
        (
            summed(model, item, layer, token, expert, STEP)
            - summed(model, item, layer, token, expert, -STEP)
        )
        / (2 * STEP)
        for token in real
    ]
    rms = (sum(x * x for x in slopes) / len(slopes)) ** 0.5
    assert rms > 1e-3
    assert found.rms[layer][expert] == pytest.approx(rms, rel=0.01)
    mean = sum(slopes) / len(slopes)
    assert found.mean[layer][expert] == pytest.approx(mean, abs=0.01 * rms)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_are_finite_differences(kind):
    model = model_of(kind)
    check_slopes(model, list(choose_layers(model))[-1])


def test_derivatives_go_through_later_routers():
    model = model_of("block", router="soft")
    check_slopes(model, next(iter(choose_layers(model))))


@pytest.mark.parametrize("kind", KINDS)
def test_an_unused_expert_has_a_finite_derivative(kind):
    found = gate_sensitivity(model_with_idle_expert(kind), items(1), noise=())
    for rms in found.rms.values():
        assert 0 < rms[3] < float("inf")


def test_moved_tokens_are_those_with_another_main_expert():
    model, (item,) = model_of("block"), items(1)
    found = gate_sensitivity(model, [item], noise=(0.0, 0.3), seed=5)
    real = item["attention_mask"].bool().flatten()
    embeddings = model.get_input_embeddings()(item["input_ids"]).detach()
    drawn = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(5)).double()
    size = embeddings.square().mean(-1, keepdim=True).sqrt()
    main = []
    for scale in (0.0, 0.3):
        with moeadapt.collect_routing(model) as routings, torch.no_grad():
            model(
                inputs_embeds=embeddings + scale * size * drawn,
                attention_mask=item["attention_mask"],
            )
        main.append({name: own[0].weights.argmax(-1)[real] for name, own in routings.items()})
    for name, shares in found.moved.items():
        assert shares[0] == 0
        expected = (main[1][name] != main[0][name]).double().mean()
        assert shares[1] == pytest.approx(float(expected))
    assert max(shares[1] for shares in found.moved.values()) > 0


def test_negative_noise_is_refused():
    with pytest.raises(ConfigError, match="at least 0"):
        gate_sensitivity(model_of("ffn"), items(1), noise=[-1.0])
