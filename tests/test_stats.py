"""Statistics of a routing against their definitions, one token at a time."""

import math

import pytest
import torch
from torch.testing import assert_close

from moeadapt import stats
from moeadapt.routing import Routing
from tests.samples import E, balanced, collapsed, routing_of

T = 49  # 49 * (1 / 49) is not 1 in float32

MASKS = {"all": None, "some": torch.arange(T) % 3 > 0, "one": torch.arange(T) == 5}
masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def sample(mask: torch.Tensor | None, dtype: torch.dtype = torch.float64) -> Routing:
    """Return a routing in which a token uses one to four experts."""
    logits = torch.randn(T, E, dtype=dtype)
    weights = logits.softmax(-1) * (logits >= logits.amax(-1, keepdim=True) - 1)
    return routing_of(logits, weights, E, mask)


def real(mask: torch.Tensor | None) -> list[int]:
    """Return the indices of the real tokens."""
    return list(range(T)) if mask is None else mask.nonzero().flatten().tolist()


@masks
def test_importance_is_the_mean_probability(mask):
    routing = sample(mask)
    rows = torch.stack([routing.probs[t] for t in real(mask)])
    assert_close(stats.importance(routing), rows.sum(0) / len(rows))
    assert_close(stats.importance(routing).sum(), torch.ones((), dtype=torch.float64))


@masks
def test_load_is_the_share_of_used_slots(mask):
    routing = sample(mask)
    used = [0] * E
    for t in real(mask):
        for e in range(E):
            used[e] += int(routing.weights[t, e] != 0)
    assert_close(stats.load(routing), torch.tensor(used, dtype=torch.float64) / sum(used))


@masks
def test_entropy_and_active_are_per_token(mask):
    routing = sample(mask)
    for t in range(T):
        nats = -sum(float(p) * math.log(float(p)) for p in routing.probs[t])
        assert_close(float(stats.entropy(routing)[t]), nats)
        assert stats.active(routing)[t] == int((routing.weights[t] != 0).sum())


def test_entropy_is_log_of_the_experts_at_most_and_zero_at_least():
    equal = routing_of(torch.zeros(3, E).double(), torch.full((3, E), 1 / E).double(), E)
    assert_close(stats.entropy(equal), torch.full((3,), math.log(E), dtype=torch.float64))
    certain = collapsed(logit=1e4)
    assert not stats.entropy(certain).any()


def test_load_and_importance_of_balance_and_collapse():
    even = torch.full((E,), 1 / E, dtype=torch.float64)
    assert_close(stats.load(balanced(2)), even)
    assert_close(stats.importance(balanced(2)), even)
    first = torch.eye(E, dtype=torch.float64)[0]
    assert_close(stats.load(collapsed(1)), first)
    assert_close(stats.importance(collapsed(1)), first)


def test_importance_has_a_gradient_and_load_has_none():
    routing = sample(None)
    probs, weights = routing.probs.requires_grad_(), routing.weights.requires_grad_()
    routing = Routing(logits=routing.logits, probs=probs, weights=weights, max_active=E)
    assert stats.importance(routing).requires_grad
    assert not stats.load(routing).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@masks
def test_counts_are_exact(mask, dtype):
    routing = sample(mask, dtype)
    packed = stats.pack(routing, [torch.tensor(2.5)])
    assert packed.dtype == torch.float32
    assert packed.shape == (stats.packed_size(E, 1),)
    used = [int((routing.weights[real(mask), e] != 0).sum()) for e in range(E)]
    assert packed[:3].tolist() == [1, 2.5, len(real(mask))]
    assert packed[4 : 4 + E].tolist() == used


def test_packing_needs_no_graph():
    routing = sample(None)
    routing = Routing(
        logits=routing.logits,
        probs=routing.probs.requires_grad_(),
        weights=routing.weights.requires_grad_(),
        max_active=E,
    )
    loss = routing.probs.square().sum()
    assert not stats.pack(routing, [loss]).requires_grad


def test_statistics_of_two_forwards_are_those_of_one_twice_as_long():
    first, second = sample(MASKS["some"]), sample(MASKS["one"])
    both = routing_of(
        torch.cat([first.logits, second.logits]),
        torch.cat([first.weights, second.weights]),
        E,
        torch.cat([MASKS["some"], MASKS["one"]]),
    )
    losses = [torch.tensor(1.0), torch.tensor(3.0)]
    summed = stats.pack(first, losses[:1]) + stats.pack(second, losses[1:])
    found, expected = stats.unpack(summed, 1), stats.unpack(stats.pack(both, [losses[0]]), 1)
    assert found.tokens == expected.tokens == int(both.token_mask.sum())
    assert_close(found.load, expected.load)
    assert_close(found.importance, expected.importance, rtol=1e-6, atol=0)
    assert_close(found.entropy, expected.entropy, rtol=1e-6, atol=0)
    assert found.active == expected.active
    assert found.losses == (2.0,)


@masks
def test_unpacked_statistics_are_the_plain_ones(mask):
    routing = sample(mask)
    found = stats.unpack(stats.pack(routing, []), 0)
    rows = real(mask)
    single = {"rtol": 1e-6, "atol": 1e-7}  # the counts travel in float32
    assert_close(found.load, stats.load(routing), **single)
    assert_close(found.importance, stats.importance(routing), **single)
    assert_close(found.entropy, float(stats.entropy(routing)[rows].mean()), **single)
    assert_close(found.active, float(stats.active(routing)[rows].mean()), **single)
    assert found.losses == ()


def test_statistics_of_padding_only_are_zero():
    routing = sample(torch.zeros(T, dtype=torch.bool))
    found = stats.unpack(stats.pack(routing, []), 0)
    assert (found.tokens, found.entropy, found.active) == (0, 0, 0)
    assert not found.load.any()
    assert not found.importance.any()
    assert not stats.load(routing).any()
    assert not stats.importance(routing).any()


@pytest.mark.parametrize("rest", [(), (E,), (E, 3)])
@masks
def test_a_token_mean_keeps_the_other_axes(mask, rest):
    values = torch.randn(T, *rest, dtype=torch.float64)
    rows = torch.stack([values[t] for t in real(mask)])
    routing = sample(mask)
    assert_close(stats.token_mean(values, routing), rows.sum(0) / len(rows))
    assert_close(stats.token_sum(values, routing), rows.sum(0))
    assert stats.token_count(routing) == len(rows)
