"""The squared coefficient of variation, against Python's own statistics."""

import statistics
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from moeadapt.balance.importance_cv2 import ImportanceCv2Config
from tests.samples import E, T, balanced, collapsed, mixture_of, routing_of

MIXTURE = mixture_of()
MASK = torch.arange(T) % 3 > 0


def loss(routing, **fields):
    return ImportanceCv2Config(**fields).loss(routing, MIXTURE)


def cv2(values):
    return statistics.pvariance(values) / statistics.mean(values) ** 2


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("num_experts", [4, 7])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("load", [0.0, 1.0])
def test_each_term_is_zero_at_balance_and_e_over_k_minus_one_at_collapse(num_experts, k, load):
    assert_close(float(loss(balanced(k, num_experts), load=load)), 0.0)
    found = loss(collapsed(k, num_experts), load=load)
    assert_close(float(found), (1 + load) * (num_experts / k - 1))


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_its_value_is_the_coefficient_of_variation_of_sums_and_counts(mask):
    weights = torch.randn(T, E, dtype=torch.float64).relu()
    kept = weights if mask is None else weights[mask]
    routing = routing_of(torch.randn_like(weights), weights, E, mask)
    sums = kept.sum(0).tolist()
    counts = (kept > 0).sum(0).double().tolist()
    assert_close(float(loss(routing)), cv2(sums))
    assert_close(float(loss(routing, load=0.3)), cv2(sums) + 0.3 * cv2(counts))


def test_null_experts_are_left_out():
    weights = torch.rand(T, E, dtype=torch.float64)
    logits = torch.randn_like(weights)
    padded = torch.cat([weights, 9 * torch.rand(T, 2, dtype=torch.float64)], -1)
    wide = replace(routing_of(torch.randn_like(padded), padded, E), null_experts=2)
    assert_close(loss(wide, load=1.0), loss(routing_of(logits, weights, E), load=1.0))


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_the_gradient_of_the_importance_is_that_of_its_value(mask):
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    chosen = torch.rand(T, E, dtype=torch.float64) > 0.3

    def value(x):
        return loss(routing_of(x, x.softmax(-1) * chosen, E, mask))

    assert torch.autograd.gradcheck(value, logits)


def test_the_gradient_of_the_load_is_that_of_the_mean_probability():
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(T, E, dtype=torch.float64).relu()
    (found,) = torch.autograd.grad(loss(routing_of(logits, weights, E), load=1.0), logits)
    counts = (weights > 0).sum(0).double().requires_grad_()
    (slope,) = torch.autograd.grad(counts.var(correction=0) / counts.mean() ** 2, counts)
    (expected,) = torch.autograd.grad((logits.softmax(-1).sum(0) * slope).sum(), logits)
    assert expected.any()
    assert_close(found, expected)


def test_nothing_in_use_costs_nothing():
    weights = torch.zeros(T, E, dtype=torch.float64, requires_grad=True)
    value = loss(routing_of(torch.zeros_like(weights), weights, E), load=1.0)
    (gradient,) = torch.autograd.grad(value, weights)
    assert value == 0
    assert torch.isfinite(gradient).all()
