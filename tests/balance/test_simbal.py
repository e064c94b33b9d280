"""SimBal against its formula, and which routers it refuses."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from moeadapt.balance.simbal import SimbalConfig
from moeadapt.errors import ConfigError
from tests.samples import ALL_REAL, E, balanced, collapsed, make_router, mixture_of


def loss(gate, routing=None):
    mixture = mixture_of()
    mixture.router.weight = nn.Parameter(gate)
    return SimbalConfig().loss(routing or balanced(1), mixture), mixture.router.weight


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("num_experts", [4, 7])
def test_it_is_zero_for_orthonormal_rows_and_counts_the_pairs_of_equal_ones(num_experts):
    unit = torch.eye(num_experts, 8, dtype=torch.float64)
    assert loss(unit)[0] == 0
    same = unit[:1].expand(num_experts, -1).clone()
    assert_close(float(loss(same)[0].detach()), float(num_experts * (num_experts - 1)))


def test_its_value_and_gradient_are_those_of_the_formula():
    gate = torch.randn(E, 8, dtype=torch.float64)
    value, weight = loss(gate)
    rows = gate.tolist()
    entries = {
        (i, j): sum(a * b for a, b in zip(rows[i], rows[j], strict=True)) - (i == j)
        for i in range(E)
        for j in range(E)
    }
    assert_close(float(value.detach()), sum(map(abs, entries.values())))
    (found,) = torch.autograd.grad(value, weight)
    sign = torch.tensor([[1.0 if entries[i, j] > 0 else -1.0 for j in range(E)] for i in range(E)])
    assert_close(found, 2 * sign.double() @ gate)


def test_tokens_do_not_matter():
    gate = torch.randn(E, 8, dtype=torch.float64)
    padding = replace(balanced(1), token_mask=torch.zeros(E, dtype=torch.bool))
    values = [loss(gate, routing)[0] for routing in (balanced(1), collapsed(), padding)]
    assert values[0] == values[1] == values[2]


def test_gradient_descent_makes_the_rows_orthonormal():
    mixture, config = mixture_of(), SimbalConfig()
    weight = mixture.router.weight
    first = float(config.loss(balanced(1), mixture).detach())
    for step in range(400):
        (slope,) = torch.autograd.grad(config.loss(balanced(1), mixture), weight)
        weight.data -= 0.02 * 0.98**step * slope
    assert float(config.loss(balanced(1), mixture).detach()) < 0.05 * first


@pytest.mark.parametrize("router", ["hash", "uniform", "cosine"])
def test_a_router_without_a_row_per_expert_is_refused(router):
    with pytest.raises(
        ConfigError, match=r"'simbal'.* use one of dynamic, .*top_k, top_p$"
    ) as info:
        SimbalConfig().check(make_router(router))
    assert "cosine" not in str(info.value)
    assert "hash" not in str(info.value)


@pytest.mark.parametrize("router", ["top_k", "relu", {"name": "top_k", "null_experts": 3}])
def test_a_router_with_a_gate_is_accepted(router):
    built = make_router(router)
    SimbalConfig().check(built)
    mixture = replace(mixture_of(), router=built)
    routing = built(mixture.hidden, ALL_REAL)
    value = SimbalConfig().loss(routing, mixture)
    assert torch.autograd.grad(value, built.weight)[0].any()
