"""Routers that look at more than one hidden state: token ids, sequences, other tokens."""

import math

import pytest
import torch
from torch.testing import assert_close

from moeadapt.routers import ROUTERS, route
from moeadapt.routing import TokenContext
from tests.routers.reference import softmax, value
from tests.samples import D, E, T, hidden, make_router


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --- hash


def ids_context(ids):
    """Return a context of token ids."""
    return TokenContext(token_ids=ids)


def test_a_hash_routes_a_token_id_always_alike():
    ids = torch.tensor([5, 9, 5, 9, 7, 5, 3])
    weights = make_router("hash")(hidden(), ids_context(ids)).weights
    assert torch.equal(weights[0], weights[2])
    again = make_router("hash")(100 * hidden(), ids_context(ids)).weights
    assert torch.equal(weights, again)


@pytest.mark.parametrize("k", [1, 3])
def test_a_hash_spreads_a_vocabulary_evenly(k):
    ids = torch.arange(50_000)
    weights = make_router({"name": "hash", "k": k})(hidden(1).expand(50_000, D), ids_context(ids))
    used = (weights.weights != 0).double()
    assert (used.sum(-1) == k).all()
    assert_close(weights.weights.sum(-1), torch.ones(50_000, dtype=torch.float64))
    share = k / E
    assert ((used.mean(0) - share).abs() < 5 * math.sqrt(share / 50_000)).all()


def test_another_seed_is_another_hash():
    ids = torch.arange(100)
    x = hidden(100)
    one, two = (
        make_router({"name": "hash", "seed": seed})(x, ids_context(ids)).weights for seed in (0, 1)
    )
    same = (one == two).all(-1).double().mean()
    assert 0.05 < same < 0.6


def test_the_hash_is_splitmix64():
    """The finaliser in Python's own integers; saved adapters depend on it for ever."""
    mask = (1 << 64) - 1

    def finalise(value):
        x = (value * 0x9E3779B97F4A7C15 + 3) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return (x ^ (x >> 31)) & (mask >> 1)

    ids = torch.tensor([0, 1, 2, 127, 49_151, 151_642, 2**31])
    weights = make_router({"name": "hash", "seed": 3})(hidden(), ids_context(ids)).weights
    assert weights.argmax(-1).tolist() == [finalise(int(i)) % E for i in ids]


# --- expert choice


def choose_by_hand(probs, sequences, mask, k):
    """Return the chosen (token, expert) pairs, sequence by sequence and expert by expert."""
    chosen = set()
    for sequence in set(sequences):
        tokens = [t for t in range(len(sequences)) if sequences[t] == sequence and mask[t]]
        room = math.ceil(len(tokens) * k / E)
        for e in range(E):
            ranked = sorted(tokens, key=lambda t: (-value(probs[t, e]), t))
            chosen |= {(t, e) for t in ranked[:room]}
    return chosen


@pytest.mark.parametrize("k", [0.5, 1.0, 2.0, 3.7])
def test_each_expert_takes_its_best_tokens_of_each_sequence(k):
    tokens = 29
    sequences = torch.randint(0, 5, (tokens,)).sort().values
    mask = torch.rand(tokens) > 0.3
    router, x = make_router({"name": "expert_choice", "k": k}), hidden(tokens)
    routing = router(x, TokenContext(mask=mask, sequences=sequences))
    expected = choose_by_hand(routing.probs, sequences.tolist(), mask.tolist(), k)
    assert set(map(tuple, (routing.weights != 0).nonzero().tolist())) == expected
    for t, e in expected:
        probs = softmax([(row * x[t]).sum() for row in router.weight])
        assert_close(routing.weights[t, e], probs[e])


def test_rows_do_not_take_each_others_places():
    router, x = make_router("expert_choice"), hidden(12)
    two = TokenContext(sequences=torch.tensor([0] * 6 + [1] * 6))
    one = TokenContext(sequences=torch.zeros(6, dtype=torch.int64))
    together = router(x, two).weights
    assert_close(together[:6], router(x[:6], one).weights)
    assert_close(together[6:], router(x[6:], one).weights)


# --- one decision per sequence

PER_SEQUENCE = [
    name for name in sorted(ROUTERS) if "sequence" in str(ROUTERS[name].model_fields.get("per", ""))
]


def test_every_router_with_a_gate_can_decide_per_sequence_but_the_one_that_cannot():
    assert set(ROUTERS) - set(PER_SEQUENCE) == {"expert_choice", "hash", "uniform"}


def per_sequence(name):
    """Build a router that decides per sequence, in eval mode."""
    extra = {"k": 2} if name == "rank_wise" else {}
    return make_router({"name": name, "per": "sequence", **extra}).eval()


@pytest.mark.parametrize("name", PER_SEQUENCE)
def test_a_sequence_is_routed_by_the_mean_of_its_real_tokens(name):
    router = per_sequence(name)
    sequences = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    mask = torch.tensor([False, True, True, True, True, True, False])
    x = hidden()
    routing = route(router, x, TokenContext(mask=mask, sequences=sequences))
    for number, members in enumerate(([1, 2], [3, 4], [5])):
        mean = sum(x[t] for t in members) / len(members)
        alone = router(mean.unsqueeze(0), TokenContext())
        for t in range(T):
            if sequences[t] == number:
                assert_close(routing.weights[t], alone.weights[0])
    assert torch.equal(routing.token_mask, mask)


@pytest.mark.parametrize("name", PER_SEQUENCE)
def test_packed_neighbours_and_padding_do_not_move_a_decision(name):
    router, x = per_sequence(name), hidden()
    sequences = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    y = x.clone()
    y[3:] = 1e3 * hidden(4)
    y[0] = float("nan")
    mask = torch.tensor([False] + 6 * [True])
    first, second = (
        route(router, v, TokenContext(mask=mask, sequences=sequences)).weights[1:3] for v in (x, y)
    )
    assert torch.equal(first, second)


def test_noise_is_drawn_once_for_a_sequence():
    router = make_router({"name": "top_k", "per": "sequence", "noise": "gaussian"}).train()
    sequences = torch.tensor([0, 0, 0, 0, 1, 1, 1])
    weights = route(router, hidden(), TokenContext(sequences=sequences)).weights
    assert (weights[:4] == weights[0]).all()
    assert (weights[4:] == weights[4]).all()


def test_a_decision_has_the_gradient_of_the_mean():
    router, x = per_sequence("soft"), hidden().requires_grad_()
    tokens = TokenContext(sequences=torch.tensor([0, 0, 0, 1, 1, 1, 1]))
    readout = torch.randn(T, E, dtype=torch.float64)
    found = torch.autograd.grad((route(router, x, tokens).weights * readout).sum(), x)[0]
    rows = [x[:3].mean(0)] * 3 + [x[3:].mean(0)] * 4
    expected = ((torch.stack(rows) @ router.weight.T).softmax(-1) * readout).sum()
    assert_close(found, torch.autograd.grad(expected, x)[0])
