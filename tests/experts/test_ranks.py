"""Experts of other ranks: listed, single, and chosen by a frozen random A."""

import pytest
import torch
from torch.testing import assert_close

from moeadapt.dispatch import Slots, contract, dispatch, expand
from moeadapt.errors import ConfigError, UnsupportedError
from moeadapt.experts import EXPERTS, BankSize
from tests.experts.kit import check_mixture, routing_weights
from tests.samples import OUT, D, E, R, T, factors_of, hidden, make_bank

RANKS = [1, 4, 2, 5]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def uneven(num_shared=0, init="random", in_features=D, out_features=OUT):
    config = EXPERTS.parse({"name": "heterogeneous", "ranks": RANKS})
    size = BankSize(
        in_features=in_features,
        out_features=out_features,
        num_experts=E,
        num_shared=num_shared,
        rank=R,
        scale=1.7,
    )
    bank = config.build(config.sized(size), init=init)
    for name in bank.factor_names:
        bank.factor(name).double()
    return bank


@pytest.mark.parametrize("num_shared", [0, 2])
def test_experts_of_listed_ranks_mix_as_their_pairs_do(num_shared):
    bank = uneven(num_shared)
    a, b = factors_of(bank)
    ranks = RANKS + [R] * num_shared

    def reference(x, weights, onto):
        y, start = onto, 0
        for e, rank in enumerate(ranks):
            own = slice(start, start + rank)
            w = weights[:, e : e + 1] if e < E else 1.0
            y = y + 1.7 * w * (x @ a[own].T @ b[:, own].T)
            start += rank
        return y

    assert a.shape == (sum(ranks), D)
    assert b.shape == (OUT, sum(ranks))
    check_mixture(bank, reference)
    x = hidden()
    for e in range(len(ranks)):
        assert_close(bank.apply_one(x, e), x @ bank.delta_weight(e).T)
        assert torch.linalg.matrix_rank(bank.delta_weight(e)) == min(ranks[e], OUT)


def test_listed_ranks_span_an_ffn():
    down, up = uneven(in_features=6, out_features=OUT), uneven(in_features=D, out_features=6)
    x, weights = hidden(), routing_weights()
    weights = weights / weights.sum(-1, keepdim=True)
    base_up, base_down = torch.randn(6, D).double(), torch.randn(OUT, 6).double()
    slots = Slots.of(weights, E, sums_to_one=True)
    wide = torch.tanh(expand(up.down(x), slots, up, x @ base_up.T))
    found = contract(wide, slots, down, lambda h: h @ base_down.T)
    expected = 0
    for e in range(E):
        h = torch.tanh(x @ base_up.T + up.apply_one(x, e))
        expected = expected + weights[:, e : e + 1] * (h @ base_down.T + down.apply_one(h, e))
    assert_close(found, expected)


def test_the_cost_of_an_expert_is_its_rank_over_the_largest():
    assert uneven(num_shared=1).costs() == (1 / 5, 4 / 5, 2 / 5, 1.0)


def test_as_many_ranks_as_experts_are_needed():
    config = EXPERTS.parse({"name": "heterogeneous", "ranks": [1, 2]})
    size = BankSize(in_features=D, out_features=OUT, num_experts=3)
    with pytest.raises(ConfigError, match=r"ranks=\[1, 2\] lists 2 experts, but there are 3"):
        config.check(config.sized(size))


def test_rank1_cuts_every_expert_into_its_ranks_and_keeps_the_scale():
    size = BankSize(in_features=D, out_features=OUT, num_experts=E, num_shared=1, rank=R, scale=1.7)
    cut = EXPERTS.parse("rank1").sized(size)
    assert (cut.num_experts, cut.num_shared, cut.rank, cut.scale) == (E * R, R, 1, 1.7)
    assert cut.all_ranks == (1,) * (E * R + R)


def test_a_cut_lora_with_equal_weights_is_the_uncut_one():
    lora = make_bank("lora")
    cut = EXPERTS.parse("rank1").build(EXPERTS.parse("rank1").sized(lora.size))
    for name in lora.factor_names:
        cut.factor(name).double().weight.data.copy_(lora.factor(name).weight.data)
    x, onto, weights = hidden(), hidden(T, OUT), routing_weights()
    fine = weights.repeat_interleave(R, dim=1)
    assert_close(dispatch(x, fine, cut, onto), dispatch(x, weights, lora, onto))


# --- a frozen random A


def flying(k=5, num_shared=0, init="random", **fields):
    return make_bank({"name": "random_a", "k": k, **fields}, num_shared=num_shared, init=init)


@pytest.mark.parametrize("num_shared", [0, 1])
def test_only_the_ranks_of_the_largest_projections_count(num_shared):
    bank = flying(num_shared=num_shared, sparsity=1.0)
    a, b = factors_of(bank)
    wide = E * R

    def reference(x, weights, onto):
        rows = []
        for t in range(T):
            h = a @ x[t]
            best = sorted(range(wide), key=lambda i: -abs(float(h[i].detach())))[:5]
            y = onto[t]
            for i in [*best, *range(wide, wide + num_shared * R)]:
                w = weights[t, i // R] if i < wide else 1.0
                y = y + 1.7 * w * h[i] * b[:, i]
            rows.append(y)
        return torch.stack(rows)

    check_mixture(bank, reference)
    x = hidden()
    parts = sum(bank.apply_one(x, e) for e in range(E + num_shared))
    assert_close(dispatch(x, None, bank, torch.zeros(T, OUT).double()), parts)


def test_uniform_weights_give_the_papers_scale():
    bank = flying(k=E * R, sparsity=1.0)
    a, b = factors_of(bank)
    x, alpha = hidden(), 1.7 * R
    uniform = torch.full((T, E), 1 / E, dtype=torch.float64)
    paper = alpha / (E * R) * (x @ a.T @ b.T)
    assert_close(dispatch(x, uniform, bank, torch.zeros(T, OUT).double()), paper)


def test_a_is_sparse_random_and_frozen():
    size = BankSize(in_features=400, out_features=3, num_experts=5, rank=4)
    bank = EXPERTS.parse({"name": "random_a", "k": 5}).build(size)
    a = bank.factor("lora_A").weight
    assert ((a != 0).sum(-1) == 100).all()
    assert_close(float(a.detach()[a != 0].std()), 1 / 20, rtol=0.05, atol=0)
    assert not torch.equal(a[0] != 0, a[1] != 0)
    assert bank.frozen == ("lora_A",)
    dense = EXPERTS.parse({"name": "random_a", "sparsity": 0.5}).build(size)
    assert ((dense.factor("lora_A").weight != 0).sum(-1) == 200).all()


def test_a_fresh_random_a_adds_nothing_and_trains_b():
    bank, x, onto = flying(init="zero_b"), hidden(), hidden(T, OUT)
    y = dispatch(x, routing_weights(), bank, onto)
    assert torch.equal(y, onto)
    assert torch.autograd.grad(y.sum(), bank.factor("lora_B").weight)[0].any()


def test_more_ranks_than_there_are_cannot_be_chosen():
    config = EXPERTS.parse({"name": "random_a", "k": 9})
    with pytest.raises(ConfigError, match=r"k=9 is larger than the 8 ranks.*1\.\.8"):
        config.check(BankSize(in_features=D, out_features=OUT, num_experts=2, rank=4))


def test_a_token_dependent_expert_is_no_matrix():
    with pytest.raises(UnsupportedError, match="no one matrix"):
        flying().delta_weight(0)
