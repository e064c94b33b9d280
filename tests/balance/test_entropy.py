"""Local and global entropy, and the mutual information that is their difference."""

import math

import pytest
import torch
from torch.testing import assert_close

from moeadapt.balance.entropy import EntropyConfig
from moeadapt.balance.mutual_information import MutualInformationConfig
from tests.samples import E, T, collapsed, mixture_of, routing_of

MIXTURE = mixture_of()
MASK = torch.arange(T) % 3 > 0


def loss(routing, **fields):
    return float(EntropyConfig(**fields).loss(routing, MIXTURE))


def information(routing):
    return float(MutualInformationConfig().loss(routing, MIXTURE))


def sure(num_experts):
    """Return a routing whose token t is sure of expert t."""
    logits = 1e3 * torch.eye(num_experts, dtype=torch.float64)
    return routing_of(logits, logits.softmax(-1), 1)


def undecided(num_experts):
    logits = torch.zeros(T, num_experts, dtype=torch.float64)
    return routing_of(logits, logits.softmax(-1), num_experts)


def nats(probs):
    return -sum(p * math.log(p) for p in probs if p > 0)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("num_experts", [4, 7])
@pytest.mark.parametrize("value", [loss, information])
def test_it_is_minus_log_e_at_balance_and_zero_at_collapse_or_indecision(num_experts, value):
    assert_close(value(sure(num_experts)), -math.log(num_experts))
    assert_close(value(collapsed(1, num_experts, logit=1e3)), 0.0)
    assert_close(value(undecided(num_experts)), 0.0)


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_each_term_has_a_coefficient_of_its_own(mask):
    logits = torch.randn(T, E, dtype=torch.float64)
    routing = routing_of(logits, logits.softmax(-1), E, mask)
    probs = logits.softmax(-1) if mask is None else logits.softmax(-1)[mask]
    local = sum(nats(row) for row in probs.tolist()) / len(probs)
    whole = nats(probs.mean(0).tolist())
    assert_close(loss(routing, local=1.0, global_=0.0), local)
    assert_close(loss(routing, local=0.0, global_=1.0), -whole)
    assert_close(loss(routing, local=0.3, global_=0.7), 0.3 * local - 0.7 * whole)
    assert_close(information(routing), local - whole)


def test_the_global_term_stops_at_the_wanted_number_of_experts():
    fields = {"local": 0.0, "min_experts": 3.0}
    assert loss(undecided(E), **fields) == 0
    assert_close(loss(collapsed(logit=1e3), **fields), math.log(3))


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("config", [EntropyConfig(local=0.3), MutualInformationConfig()])
def test_its_gradient_is_that_of_its_value(mask, config):
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: config.loss(routing_of(x, x.softmax(-1), E, mask), MIXTURE), logits
    )


@pytest.mark.parametrize("config", [EntropyConfig(), MutualInformationConfig()])
def test_probabilities_of_zero_have_a_finite_gradient(config):
    logits = (1e4 * torch.eye(E)).requires_grad_()
    probs = logits.softmax(-1)
    assert (probs == 0).any()
    value = config.loss(routing_of(logits, probs, E), MIXTURE)
    (gradient,) = torch.autograd.grad(value, logits)
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()
