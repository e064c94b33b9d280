"""The share of null experts: value, gradient, refusals, and a loop that reaches the target."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from moeadapt.balance.null_rate import NullRateConfig
from moeadapt.errors import ConfigError
from moeadapt.routers import ROUTERS
from moeadapt.routing import TokenContext
from tests.samples import ALL_REAL, E, T, make_router, mixture_of, routing_of

MIXTURE = mixture_of({"name": "top_k", "k": 3, "null_experts": 2})


def routing_with(chosen, logits=None, mask=None):
    """Return a routing whose last two experts are null."""
    chosen = torch.as_tensor(chosen).double()
    logits = torch.zeros_like(chosen) if logits is None else logits
    return replace(routing_of(logits, chosen, 2, mask), null_experts=2)


def loss(routing, target=0.5):
    return NullRateConfig(target=target).loss(routing, MIXTURE)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_it_is_zero_at_the_target_and_the_squared_distance_elsewhere():
    half = routing_with([[1, 0, 1, 0], [0, 1, 0, 1]])
    null = routing_with([[0, 0, 1, 1], [0, 0, 1, 1]])
    none = routing_with([[1, 1, 0, 0], [1, 1, 0, 0]])
    assert loss(half) == 0
    for target in (0.25, 0.5):
        assert_close(float(loss(null, target)), (1 - target) ** 2)
        assert_close(float(loss(none, target)), target**2)
    assert_close(float(loss(half, 0.25)), 0.25**2)


def test_padding_is_not_counted():
    mask = torch.tensor([True, False, True])
    found = loss(routing_with([[1, 0, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0]], mask=mask), 0.125)
    assert_close(float(found), (1 / 4 - 1 / 8) ** 2)


def test_its_gradient_is_that_of_the_null_probability_times_twice_the_distance():
    logits = torch.randn(T, 4, dtype=torch.float64, requires_grad=True)
    chosen = torch.zeros(T, 4, dtype=torch.float64)
    chosen[:, 0], chosen[:2, 3] = 1, 1
    (found,) = torch.autograd.grad(loss(routing_with(chosen, logits), 0.7), logits)
    null = logits.softmax(-1)[:, 2:].sum(-1).mean()
    (expected,) = torch.autograd.grad(2 * (2 / (T + 2) - 0.7) * null, logits)
    assert expected.any()
    assert_close(found, expected)


def test_nothing_but_padding_moves_nothing():
    logits = torch.randn(T, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(T, dtype=torch.bool)
    value = loss(routing_with(torch.ones(T, 4), logits, mask))
    assert torch.isfinite(value)
    assert not torch.autograd.grad(value, logits)[0].any()


@pytest.mark.parametrize("target", [0.2, 0.6])
def test_a_closed_loop_reaches_the_target(target):
    router = ROUTERS.parse({"name": "top_k", "k": 3, "null_experts": 3, "bias": True}).build(8, E)
    torch.nn.init.normal_(router.weight)
    x, config = torch.randn(211, 8), NullRateConfig(target=target)
    optimizer = torch.optim.SGD(router.parameters(), lr=1.0)
    shares = []
    for _ in range(300):
        routing = router(x, TokenContext())
        optimizer.zero_grad()
        config.loss(routing, MIXTURE).backward()
        optimizer.step()
        used = (routing.weights != 0).double()
        shares.append(float(used[:, E:].sum() / used.sum()))
    assert abs(shares[0] - target) > 0.1
    assert abs(shares[-1] - target) < 0.03


def test_a_router_without_null_experts_is_refused():
    for router in ("top_k", "uniform"):
        with pytest.raises(ConfigError, match="'null_rate' needs null experts"):
            NullRateConfig().check(make_router(router))
    NullRateConfig().check(MIXTURE.router)
    assert MIXTURE.router(MIXTURE.hidden, ALL_REAL).null_experts == 2
