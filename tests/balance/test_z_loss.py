"""The router z-loss against its equation."""

import math

import pytest
import torch
from torch.testing import assert_close

from moeadapt.balance.z_loss import ZLossConfig
from tests.samples import E, T, collapsed, mixture_of, routing_of

MIXTURE = mixture_of()


def loss(routing):
    return ZLossConfig().loss(routing, MIXTURE)


@pytest.mark.parametrize("mask", [None, torch.arange(T) % 3 > 0], ids=["all", "masked"])
def test_it_is_the_mean_squared_log_sum_of_exponentials(mask):
    torch.manual_seed(0)
    logits = torch.randn(T, E, dtype=torch.float64)
    kept = range(T) if mask is None else mask.nonzero().flatten().tolist()
    squares = [math.log(sum(math.exp(x) for x in logits[t].tolist())) ** 2 for t in kept]
    found = loss(routing_of(logits, logits.softmax(-1), E, mask))
    assert_close(float(found), sum(squares) / len(squares))


@pytest.mark.parametrize("num_experts", [4, 7])
def test_it_is_log_e_squared_when_all_logits_are_zero(num_experts):
    logits = torch.zeros(T, num_experts, dtype=torch.float64)
    found = loss(routing_of(logits, logits.softmax(-1), num_experts))
    assert_close(float(found), math.log(num_experts) ** 2)


def test_it_is_about_the_squared_logit_at_collapse():
    assert_close(float(loss(collapsed(logit=50.0))), 50.0**2)


def test_its_gradient_is_that_of_its_formula():
    torch.manual_seed(0)
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: loss(routing_of(x, x.softmax(-1), E)), logits)
