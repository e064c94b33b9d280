"""What every expert type promises, checked for all of them at once."""

import pytest
import torch
from torch.testing import assert_close

from moeadapt.dispatch import dispatch, dispatch_reference
from moeadapt.experts import EXPERTS
from tests.contracts.kit import experts, matrices, routers, shared
from tests.samples import (
    ALL_REAL,
    OUT,
    D,
    E,
    T,
    factors_of,
    hidden,
    make_bank,
    make_router,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@experts
@shared
def test_the_fast_mixture_equals_its_definition_in_value_and_every_gradient(expert, num_shared):
    bank = make_bank(expert, num_shared=num_shared)
    x, onto = hidden().requires_grad_(), hidden(T, OUT).requires_grad_()
    weights = torch.rand(T, E, dtype=torch.float64)
    weights = (weights * (weights > 0.3)).requires_grad_()
    # Experts that scale the base output do not look at the input.
    leaves = [*([] if bank.needs_base else [x]), weights, onto, *factors_of(bank)]
    upstream = hidden(T, OUT)
    expected = dispatch_reference(x, weights, bank, onto)
    wanted = torch.autograd.grad(expected, leaves, upstream)
    for inplace in (False, True):
        found = dispatch(x, weights, bank, onto * 1, inplace=inplace)
        assert_close(found, expected)
        for fast, slow in zip(torch.autograd.grad(found, leaves, upstream), wanted, strict=True):
            assert slow.any()
            assert_close(fast, slow)


@experts
@routers
def test_a_routed_mixture_trains_its_router_as_defined(expert, spec):
    router, bank = make_router(spec), make_bank(expert)
    x = hidden().requires_grad_()
    leaves = [x, *factors_of(bank), *router.parameters()]
    results = []
    for run in (dispatch, dispatch_reference):
        torch.manual_seed(1)
        y = run(x, router(x, ALL_REAL).expert_weights, bank, x[:, :OUT] * 1)
        grads = torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)
        results.append([y, *(g for g in grads if g is not None)])
    for fast, slow in zip(*results, strict=True):
        assert_close(fast, slow)


@experts
def test_without_weights_every_expert_counts_fully(expert):
    bank, x, onto = make_bank(expert, num_shared=1), hidden(), hidden(T, OUT)
    total = onto + sum(bank.apply_one(x, e, onto) for e in range(bank.size.total_experts))
    assert_close(dispatch(x, None, bank, onto), total)


@matrices
@shared
def test_delta_weight_is_what_apply_one_applies(expert, num_shared):
    bank, x = make_bank(expert, num_shared=num_shared), hidden()
    for e in range(bank.size.total_experts):
        assert bank.delta_weight(e).shape == (OUT, D)
        assert bank.delta_weight(e).any()
        assert_close(bank.apply_one(x, e), x @ bank.delta_weight(e).T)


@experts
@shared
@pytest.mark.parametrize("init", ["zero_b", "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_fresh_bank_changes_not_one_bit(expert, num_shared, init, dtype):
    if init not in EXPERTS[expert].bank.inits:
        return  # refused with the reason, see tests/peft/test_inits.py
    bank = make_bank(expert, num_shared=num_shared, init=init)
    for name in bank.factor_names:
        bank.factor(name).float()
    x, onto = hidden().to(dtype), hidden(T, OUT).to(dtype)
    weights = torch.rand(T, E)
    for inplace in (False, True):
        assert torch.equal(dispatch(x, weights, bank, onto.clone(), inplace=inplace), onto)
    for e in range(bank.size.total_experts):
        assert not bank.apply_one(x, e, onto).any()


@experts
def test_the_random_start_has_no_expert_without_effect(expert):
    bank = make_bank(expert, num_shared=2, init="random")
    x, onto = hidden(), hidden(T, OUT)
    assert all(bank.apply_one(x, e, onto).any() for e in range(bank.size.total_experts))


@experts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_experts_keep_the_dtype_of_the_base(expert, dtype):
    bank = make_bank(expert)
    for name in bank.factor_names:
        bank.factor(name).float()
    x, onto, weights = hidden().to(dtype), hidden(T, OUT).to(dtype), torch.rand(T, E)
    y = dispatch(x, weights, bank, onto)
    assert y.dtype == dtype
    exact = dispatch_reference(x.float(), weights, bank, onto.float())
    size = float(exact.detach().abs().max())
    assert_close(y.float(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps * size)
    assert dispatch(x, weights, bank, onto.float()).dtype == torch.float32
