"""Paired losses of texts, and their errors."""

import math
import statistics

import pytest
import torch

from moeadapt.interpret import counterfactual, read_batches
from moeadapt.interpret.counterfactual import ratio
from tests.interpret.kit import items, model_of, token_losses
from tests.toy import toy_tokenizer


@pytest.fixture(scope="module")
def model():
    return model_of("block")


def test_each_text_is_measured_with_and_without(model):
    data = items()
    found = counterfactual(model, data, router="uniform")
    own = [row for item in data for row in token_losses(model, item)]
    other = [row for item in data for row in token_losses(model, item, router="uniform")]
    assert found.learned == pytest.approx([statistics.mean(row) for row in own])
    assert found.overridden == pytest.approx([statistics.mean(row) for row in other])
    assert found.tokens == tuple(len(row) for row in own)
    total = sum(map(sum, other)) - sum(map(sum, own))
    assert found.difference.mean == pytest.approx(total / sum(map(len, own)))
    assert found.difference.texts == 6
    red = [i for i in range(6) if i % 3 != 1]
    total = sum(sum(other[i]) - sum(own[i]) for i in red)
    assert found.by_domain["red"].mean == pytest.approx(total / sum(len(own[i]) for i in red))
    assert found.by_domain["red"].texts == 4


def forced(_, routing):
    weights = torch.zeros_like(routing.expert_weights)
    weights[:, 2] = routing.expert_weights.sum(1)
    return weights


def swapped(_, routing):
    return routing.expert_weights[:, [3, 1, 2, 0]]


def without_first(_, routing):
    """Give a token that uses expert 0 the best two of the others, in proportion to their chance."""
    weights = routing.expert_weights.clone()
    for row in weights[:, 0].nonzero()[:, 0]:
        chances = routing.probs[row, :4].clone()
        chances[0] = -1
        best = chances.topk(2).indices
        weights[row] = 0
        weights[row, best] = chances[best] / chances[best].sum() * routing.expert_weights[row].sum()
    return weights


@pytest.mark.parametrize(
    ("override", "edit"),
    [({"force": 2}, forced), ({"swap": (0, 3)}, swapped), ({"ban": 0}, without_first)],
    ids=["force", "swap", "ban"],
)
def test_texts_are_measured_as_if_tokens_went_elsewhere(model, override, edit):
    data = items()
    found = counterfactual(model, data, **override)
    slow = [row for item in data for row in token_losses(model, item, edit=edit)]
    assert found.overridden == pytest.approx([statistics.mean(row) for row in slow])
    assert abs(found.difference.mean) > 1e-6


def test_with_texts_of_one_length_the_error_is_that_of_a_mean():
    sums = torch.tensor([1.0, 4.0, -2.0, 3.5, 0.5], dtype=torch.float64)
    mean, error = ratio(sums, torch.full_like(sums, 4))
    each = [x / 4 for x in sums.tolist()]
    assert mean == pytest.approx(statistics.mean(each))
    assert error == pytest.approx(statistics.stdev(each) / math.sqrt(5))


def test_the_error_is_the_spread_over_many_data_sets():
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(5, 60, (2000, 40), generator=generator).double()
    noise = torch.randn(counts.shape, generator=generator, dtype=torch.float64)
    sums = counts * (0.3 + 0.5 * noise)
    pairs = [ratio(a, b) for a, b in zip(sums, counts, strict=True)]
    spread = statistics.stdev(mean for mean, _ in pairs)
    assert statistics.mean(error for _, error in pairs) == pytest.approx(spread, rel=0.05)


def test_the_same_routing_makes_no_difference(model):
    found = counterfactual(model, items(), edit=lambda _, routing: routing.expert_weights)
    assert found.difference.mean == pytest.approx(0, abs=1e-12)
    assert found.difference.standard_error == pytest.approx(0, abs=1e-12)


def test_one_text_has_no_error_and_an_empty_one_no_loss(model):
    one = {name: x[:1] for name, x in items(1)[0].items() if name != "domain"}
    assert math.isnan(counterfactual(model, [one], k=1).difference.standard_error)
    labels = one["input_ids"].repeat(2, 1)
    labels[1] = -100
    two = {name: x.repeat(2, 1) for name, x in one.items()}
    found = counterfactual(model, [{**two, "labels": labels}], k=1)
    assert math.isnan(found.learned[1])
    assert found.difference.texts == 1


def test_padding_side_and_batch_do_not_change_a_texts_loss(model):
    tokenizer = toy_tokenizer()
    texts = ["w1 w2 w3 w4 w5 w6", "w9 w7", "w30 w20 w10"]
    found = []
    for side in ("left", "right"):
        tokenizer.padding_side = side
        for size in (1, 3):
            data = read_batches(texts, tokenizer=tokenizer, batch_size=size)
            found.append(counterfactual(model, data, k=1))
    assert found[0].tokens == (5, 1, 2)
    for other in found[1:]:
        assert other.tokens == found[0].tokens
        assert other.learned == pytest.approx(found[0].learned)
        assert other.overridden == pytest.approx(found[0].overridden)
