"""(IA)^3 experts scale the base output."""

import pytest
import torch
from torch.testing import assert_close

from moeadapt.dispatch import dispatch
from moeadapt.errors import UnsupportedError
from tests.experts.kit import routing_weights
from tests.samples import OUT, E, T, factors_of, hidden, make_bank


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("num_shared", [0, 2])
def test_the_base_output_is_scaled_by_one_plus_the_mixed_vectors(num_shared):
    bank = make_bank("ia3", num_shared=num_shared)
    (v,) = factors_of(bank)

    def reference(x, weights, onto):
        rows = []
        for t in range(T):
            mixed = sum(weights[t, e] * v[:, e] for e in range(E))
            mixed = mixed + sum(v[:, e] for e in range(E, E + num_shared))
            rows.append(onto[t] * (1 + mixed) + 0 * x[t].sum())
        return torch.stack(rows)

    x, onto = hidden(), hidden(T, OUT).requires_grad_()
    weights = routing_weights().requires_grad_()
    leaves, upstream = [onto, weights, v], hidden(T, OUT)
    expected = reference(x, weights, onto)
    wanted = torch.autograd.grad(expected, leaves, upstream)
    for inplace in (False, True):
        found = dispatch(x, weights, bank, onto * 1, inplace=inplace)
        assert_close(found, expected)
        for fast, slow in zip(torch.autograd.grad(found, leaves, upstream), wanted, strict=True):
            assert slow.any()
            assert_close(fast, slow)


def test_what_one_expert_adds_is_the_base_output_times_its_vector():
    bank, x, onto = make_bank("ia3"), hidden(), hidden(T, OUT)
    total = onto + sum(bank.apply_one(x, e, onto) for e in range(E))
    assert_close(dispatch(x, None, bank, onto), total)
    assert not torch.equal(total, onto)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_fresh_bank_changes_not_one_bit_and_can_be_trained(dtype):
    bank, x, onto = make_bank("ia3", init="zero_b"), hidden().to(dtype), hidden(T, OUT).to(dtype)
    y = dispatch(x, routing_weights(), bank, onto)
    assert y.dtype == dtype
    assert torch.equal(y, onto)
    (grad,) = torch.autograd.grad(y.float().sum(), factors_of(bank))
    assert grad.any()


def test_a_small_scale_is_not_rounded_away():
    bank = make_bank("ia3", init="zero_b")
    bank.factor("ia3_scale").weight.data.fill_(2**-9)
    onto = torch.full((1, OUT), 1.0 + 2**-7).bfloat16()
    y = dispatch(hidden(1).bfloat16(), torch.ones(1, E), bank, onto)
    # 1.0078 * (1 + 4 / 512) = 1.0157, two steps above 1.0
    assert (y.float() == 1.0 + 2**-6).all()


def test_it_is_no_matrix_and_has_no_ffn_form():
    bank = make_bank("ia3")
    with pytest.raises(UnsupportedError, match="no matrix"):
        bank.delta_weight(0)
    with pytest.raises(UnsupportedError, match="ffn"):
        bank.up(torch.ones(T, E, dtype=torch.float64), None, False)


def test_an_expert_is_one_vector():
    assert [tuple(f.shape) for f in factors_of(make_bank("ia3"))] == [(OUT, E)]
