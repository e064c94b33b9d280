"""Dispatch beyond its contract: half precision, slots, memory that is written in place."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from moeadapt.dispatch import (
    Slots,
    combine,
    contract,
    dispatch,
    dispatch_reference,
    expand,
)
from tests.contracts.kit import experts, ffn_experts, matrices
from tests.samples import ALL_REAL, OUT, D, E, T, factors_of, hidden, make_bank, make_router


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --- one linear


def test_shared_experts_get_weight_one_and_come_last():
    weights = torch.rand(T, E)
    bank = make_bank("lora", num_shared=2)
    both = torch.cat([weights, torch.ones(T, 2)], -1) * bank.size.scale
    assert torch.equal(bank.scaled(weights, torch.float32), both)
    alone = make_bank("lora").scaled(weights, torch.bfloat16)
    assert torch.equal(alone, (weights * bank.size.scale).bfloat16())


@matrices
def test_mixing_in_place_writes_where_it_is_told(expert):
    bank, x, onto = make_bank(expert), hidden(), hidden(T, OUT)
    weights = torch.rand(T, E, dtype=torch.float64)
    before = onto.clone()
    separate = dispatch(x, weights, bank, onto)
    assert separate.data_ptr() != onto.data_ptr()
    assert torch.equal(before, onto)
    same = dispatch(x, weights, bank, onto, inplace=True)
    assert same.data_ptr() == onto.data_ptr()
    assert_close(same, separate)
    assert not torch.equal(before, onto)


@pytest.mark.parametrize("expert", ["lora", "heterogeneous", "rank1", "shared_b"])
def test_an_expert_that_is_not_chosen_may_overflow_in_float16(expert):
    bank = make_bank(expert)
    for factor in factors_of(bank):
        factor.data = factor.data.half()
    x = hidden().half().requires_grad_()
    weights = torch.zeros(T, E)
    weights[:, 0] = 1
    first = bank.factor(bank.factor_names[0]).weight
    first.data[bank.size.rank :] = 6e4  # every other expert
    assert torch.isinf(bank.down(x)).any()
    y = dispatch(x, weights, bank, torch.zeros(T, OUT, dtype=torch.float16))
    assert torch.isfinite(y).all()
    one = bank.apply_one(x, 0)
    assert_close(
        y, one, rtol=0, atol=4 * torch.finfo(x.dtype).eps * float(one.detach().abs().max())
    )
    grads = torch.autograd.grad(y.square().sum(), [x, *factors_of(bank)])
    assert all(torch.isfinite(g).all() for g in grads)


@experts
def test_one_token_and_no_token_are_batches_too(expert):
    bank = make_bank(expert, num_shared=1)
    for tokens in (0, 1):
        x, onto = hidden(tokens), hidden(tokens, OUT)
        weights = torch.rand(tokens, E, dtype=torch.float64)
        y = dispatch(x, weights, bank, onto)
        assert y.shape == (tokens, OUT)
        if tokens:
            assert_close(y, dispatch_reference(x, weights, bank, onto))


@experts
def test_dispatch_passes_gradcheck(expert):
    bank = make_bank(expert, num_shared=1)
    x, onto = hidden(3).requires_grad_(), hidden(3, OUT).requires_grad_()
    weights = torch.rand(3, E, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: dispatch(a[0], a[1], bank, a[2]), (x, weights, onto))


# --- slots


@pytest.mark.parametrize("k", [1, 2, E])
@pytest.mark.parametrize("normalize", ["none", "topk_softmax"])
@pytest.mark.filterwarnings("ignore:router 'top_k' with k=1")
def test_slots_hold_the_weights_and_sum_to_one(k, normalize):
    router = make_router({"name": "top_k", "k": k, "normalize": normalize})
    weights = router(hidden(), ALL_REAL).weights
    slots = Slots.of(weights, k, sums_to_one=router.sums_to_one)
    rebuilt = (slots.choice * slots.weights.unsqueeze(-1)).sum(0)
    assert_close(rebuilt, weights)
    assert_close(slots.weights.sum(0), torch.ones(T, dtype=torch.float64))
    assert slots.choice.shape == (k + (normalize == "none"), T, E)
    assert set(slots.choice.unique().tolist()) <= {0.0, 1.0}


def test_without_a_sum_of_one_the_first_slot_is_the_base():
    weights = make_router({"name": "top_k", "normalize": "none"})(hidden(), ALL_REAL).weights
    slots = Slots.of(weights, 2, sums_to_one=False)
    assert not slots.choice[0].any()
    assert_close(slots.weights[0], 1 - weights.sum(-1))


def test_with_a_sum_of_one_the_first_slot_is_the_best_expert():
    weights = make_router("top_k")(hidden(), ALL_REAL).weights
    slots = Slots.of(weights, 2, sums_to_one=True)
    assert torch.equal(slots.choice[0].argmax(-1), weights.argmax(-1))


@pytest.mark.parametrize("sums_to_one", [True, False])
def test_activations_that_agree_are_combined_to_themselves(sums_to_one):
    """Rounding in the weights must not move a base FFN that no expert has changed."""
    weights = torch.rand(T, E).softmax(-1)
    slots = Slots.of(weights, E, sums_to_one=sums_to_one)
    one = torch.randn(T, 11)
    assert torch.equal(combine(one.expand(slots.weights.shape[0], T, 11), slots), one)
    naive = (one * slots.weights.unsqueeze(-1)).sum(0)
    assert not torch.equal(naive, one)


def test_a_combination_is_the_weighted_sum():
    weights = torch.rand(T, E, dtype=torch.float64).softmax(-1)
    slots = Slots.of(weights, E, sums_to_one=True)
    each = torch.randn(E, T, 11, dtype=torch.float64)
    assert_close(combine(each, slots), (each * slots.weights.unsqueeze(-1)).sum(0))


@ffn_experts
def test_dropout_meets_the_experts_and_not_the_base(expert):
    bank = make_bank(expert, 11, OUT)
    base = nn.Linear(11, OUT).double()
    slots = Slots.of(torch.rand(T, E, dtype=torch.float64).softmax(-1), E, sums_to_one=True)
    wide = torch.randn(E, T, 11, dtype=torch.float64)
    only_base = contract(wide, slots, bank, base, dropout=torch.zeros_like)
    assert_close(only_base, base(combine(wide, slots)))
    assert not torch.allclose(contract(wide, slots, bank, base), only_base)


@ffn_experts
def test_the_base_projections_of_an_ffn_run_once_whatever_k(expert):
    calls = []
    base = nn.Linear(11, OUT).double()

    def counted(x):
        calls.append(x.shape)
        return base(x)

    for k in (1, 2, E):
        weights = make_router({"name": "top_k", "k": k})(hidden(), ALL_REAL).weights
        slots = Slots.of(weights, k, sums_to_one=k > 1)
        bank = make_bank(expert, D, 11)
        wide = expand(bank.down(hidden()), slots, bank, hidden(T, 11))
        assert wide.shape[0] == slots.weights.shape[0]
        calls.clear()
        contract(wide, slots, make_bank(expert, 11, OUT), counted)
        assert calls == [(T, 11)]
