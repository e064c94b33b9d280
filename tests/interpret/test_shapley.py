"""Shapley values: the definition, the axioms, and what sampling makes of them."""

import math
import sys
from functools import cache
from itertools import permutations
from random import Random

import pytest
import torch

from moeadapt.errors import ConfigError
from moeadapt.interpret import shapley
from moeadapt.interpret.shapley import exact_values, sampled_values
from tests.interpret.kit import KINDS, items, mean_loss, model_of, model_with_idle_expert, zeroed


def random_game(players, seed=0):
    random, table = Random(seed), {}
    return lambda coalition: table.setdefault(coalition, random.gauss(0, 1))


def slow(value, players):
    """Average what each player adds over all orders in which they may join."""
    sums = [0.0] * players
    for order in permutations(range(players)):
        for place, player in enumerate(order):
            before = frozenset(order[:place])
            sums[player] += value(before | {player}) - value(before)
    return [total / math.factorial(players) for total in sums]


@pytest.mark.parametrize("players", [1, 2, 5])
def test_exact_values_are_the_mean_over_all_orders(players):
    value = random_game(players)
    assert exact_values(value, players) == pytest.approx(slow(value, players))


def test_of_two_left_gloves_and_a_right_one_the_right_one_is_worth_most():
    """The glove game: 0 owns a right glove, 1 and 2 a left one; a pair is worth 1."""
    pair = lambda coalition: float(0 in coalition and len(coalition) > 1)  # noqa: E731
    assert exact_values(pair, 3) == pytest.approx([2 / 3, 1 / 6, 1 / 6])


def test_in_an_additive_game_each_player_gets_what_it_adds():
    worth = [1.5, -2.0, 0.0, 4.0]
    value = lambda coalition: sum(worth[p] for p in coalition)  # noqa: E731
    assert exact_values(value, 4) == pytest.approx(worth)
    values, errors = sampled_values(value, [[3, 1, 2, 0], [0, 1, 2, 3]])
    assert values == pytest.approx(worth)
    assert errors == pytest.approx([0, 0, 0, 0])


def test_all_orders_sampled_once_are_exact():
    value = random_game(4)
    values, _ = sampled_values(value, list(permutations(range(4))))
    assert values == pytest.approx(slow(value, 4))


def test_sampled_values_are_within_their_errors():
    value, players, orders = random_game(6), 6, 400
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randperm(players, generator=generator).tolist() for _ in range(orders)]
    values, errors = sampled_values(value, drawn)
    exact = slow(value, players)
    off = [(a - b) / e for a, b, e in zip(values, exact, errors, strict=True)]
    assert max(map(abs, off)) < 3.5
    # The errors are not so wide that anything would pass.
    assert max(errors) < 0.1
    assert sum(values) == pytest.approx(sum(exact))


@pytest.fixture(scope="module")
def models():
    return {kind: model_of(kind) for kind in KINDS[1:]}


@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_game_is_minus_the_loss_of_the_experts_left(kind, models):
    model, data = models[kind], items(1)
    found = shapley(model, data)

    @cache
    def value(coalition):
        off = [e for e in range(4) if e not in coalition]
        return -mean_loss(model, data, edit=zeroed(off))

    assert found.values == pytest.approx(slow(value, 4))
    assert found.coalitions == 16
    assert found.standard_errors is None


@pytest.mark.parametrize("exact", [True, False])
def test_values_share_out_the_whole_gain(exact, models):
    found = shapley(models["block"], items(1), exact=exact, samples=3)
    assert sum(found.values) == pytest.approx(found.all_on - found.all_off, abs=1e-12)
    assert (found.standard_errors is None) == exact


def test_exact_values_of_too_many_experts_are_refused(models, monkeypatch):
    monkeypatch.setattr(sys.modules[exact_values.__module__], "MOST_EXACT", 3)
    with pytest.raises(ConfigError, match=r"exact=True takes 2\^4 passes .* Leave it out"):
        shapley(models["block"], items(1), exact=True)


def test_sampling_a_model_agrees_with_its_exact_values(models):
    exact = shapley(models["ffn"], items(1))
    found = shapley(models["ffn"], items(1), exact=False, samples=200, seed=1)
    for a, b, error in zip(found.values, exact.values, found.standard_errors, strict=True):
        assert abs(a - b) <= 4 * error + 1e-12
    assert found.coalitions <= 16


def test_in_one_layer_the_others_keep_their_experts(models):
    model, data, layer = models["block"], items(1), "model.layers.0.mlp"
    found = shapley(model, data, layer=layer)
    assert found.all_on == pytest.approx(-mean_loss(model, data))
    off = mean_loss(model, data, edit=zeroed(range(4), [layer]))
    assert found.all_off == pytest.approx(-off)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_an_unused_expert_is_worth_nothing(kind):
    model = model_with_idle_expert(kind)
    found = shapley(model, items(1))
    assert found.values[3] == 0
    assert abs(found.values[0]) > 1e-6


def test_one_sample_has_no_error():
    with pytest.raises(ConfigError, match="2 or more"):
        shapley(model_of("ffn"), items(1), exact=False, samples=1)


@pytest.mark.parametrize(("experts", "exact"), [(8, True), (9, False)])
def test_values_are_exact_up_to_eight_experts_and_sampled_with_errors_beyond(experts, exact):
    model = model_of("ffn", num_experts=experts, r=2)
    found = shapley(model, items(1), layer="model.layers.0.mlp", samples=2)
    assert len(found.values) == experts
    assert (found.standard_errors is None) == exact
    assert (found.coalitions == 2**experts) == exact
    assert sum(found.values) == pytest.approx(found.all_on - found.all_off, abs=1e-12)
