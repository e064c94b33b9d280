"""Switch load balancing: what its file promises, and transformers' function as an oracle."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moeadapt.balance.switch import SwitchConfig
from moeadapt.routers import ROUTERS
from moeadapt.routing import TokenContext
from tests.samples import ALL_REAL, D, E, balanced, collapsed, hidden, mixture_of, routing_of

MIXTURE = mixture_of()


def loss(routing):
    return SwitchConfig().loss(routing, MIXTURE)


one = torch.ones((), dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("k", [1, 2, 3, E])
@pytest.mark.parametrize("num_experts", [4, 7, 61])
def test_it_is_one_at_perfect_balance_for_every_k(k, num_experts):
    assert_close(loss(balanced(k, num_experts)), one)


@pytest.mark.parametrize("num_experts", [4, 7, 61])
def test_it_is_the_number_of_experts_at_collapse(num_experts):
    assert_close(loss(collapsed(1, num_experts, logit=1e3)), num_experts * one)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_transformers_gives_k_times_ours_in_value_and_gradient(k, masked):
    tokens, num_experts = 101, 7
    router = ROUTERS.parse({"name": "top_k", "k": k}).build(D, num_experts)
    torch.nn.init.normal_(router.weight)
    x = hidden(tokens).float()
    mask = torch.arange(tokens) % 3 > 0 if masked else None
    routing = router(x, TokenContext(mask=mask) if masked else ALL_REAL)
    theirs = load_balancing_loss_func(
        (routing.logits,), num_experts, k, None if mask is None else mask.long()[None]
    )
    assert_close(k * loss(routing), theirs)
    (found,) = torch.autograd.grad(k * loss(routing), router.weight, retain_graph=True)
    (expected,) = torch.autograd.grad(theirs, router.weight)
    assert found.any()
    assert_close(found, expected)


def test_two_layers_that_collapse_differently_are_not_balanced():
    """Pooled over layers, as in transformers, their loads would add up to perfect balance."""
    first = collapsed(1, 2, logit=50.0)
    second = torch.flip(first.logits, [-1])
    pooled = load_balancing_loss_func((first.logits.float(), second.float()), 2, 1)
    assert_close(pooled, torch.tensor(1.0))
    assert_close(loss(first), 2 * one)


def test_null_experts_count_as_their_average():
    """AdaMoE's form: two null experts used 3 and 1 times count as used twice each."""
    chosen = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0], [1, 0, 1, 0], [0, 1, 0, 1]]).double()
    logits = torch.randn(4, 4, dtype=torch.float64)
    routing = replace(routing_of(logits, chosen / 2, 2), null_experts=2)
    probs = logits.softmax(-1).mean(0)
    assert_close(loss(routing), 4 * (probs * torch.tensor([2, 2, 2, 2]).double() / 8).sum())
