"""Variance of the mean probabilities, against Python's own statistics."""

import statistics
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from moeadapt.balance.variance import VarianceConfig
from tests.samples import E, T, balanced, collapsed, mixture_of, routing_of

MIXTURE = mixture_of()
MASK = torch.arange(T) % 3 > 0


def loss(routing):
    return VarianceConfig().loss(routing, MIXTURE)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("num_experts", [4, 7])
def test_it_is_zero_at_balance_and_nearly_one_over_e_at_collapse(num_experts):
    assert_close(float(loss(balanced(2, num_experts))), 0.0)
    expected = (num_experts - 1) / num_experts**2
    assert_close(float(loss(collapsed(1, num_experts, logit=1e3))), expected)


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_its_value_and_gradient_are_those_of_the_variance_of_the_mean(mask):
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    probs = logits.detach().softmax(-1)
    means = (probs if mask is None else probs[mask]).mean(0).tolist()
    assert_close(
        float(loss(routing_of(logits, logits, E, mask)).detach()), statistics.pvariance(means)
    )
    assert torch.autograd.gradcheck(lambda x: loss(routing_of(x, x, E, mask)), logits)


def test_how_null_experts_differ_among_themselves_does_not_count():
    logits = torch.tensor([[1.0, 2.0, 5.0, -1.0]], dtype=torch.float64)
    probs = logits.softmax(-1)[0].tolist()
    null = (probs[2] + probs[3]) / 2
    found = loss(replace(routing_of(logits, logits, 2), null_experts=2))
    assert_close(float(found), statistics.pvariance([*probs[:2], null, null]))
