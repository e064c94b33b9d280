"""Gram-Schmidt of the experts' outputs, against Gram-Schmidt of the vectors themselves."""

import pytest
import torch
from torch.testing import assert_close

from moeadapt.dispatch import dispatch
from moeadapt.experts import EXPERTS
from tests.experts.kit import check_mixture, routing_weights
from tests.samples import OUT, E, R, T, factors_of, hidden, make_bank

SPEC = {"name": "lora", "orthogonalize": True}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def gram_schmidt(vectors):
    done = []
    for v in vectors:
        u = v
        for other in done:
            u = u - (u @ other) / (other @ other) * other
        done.append(u)
    return done


@pytest.mark.parametrize("num_shared", [0, 2])
def test_the_mixture_is_of_orthogonalised_outputs_of_the_active_experts(num_shared):
    bank = make_bank(SPEC, num_shared=num_shared)
    a, b = factors_of(bank)

    def output(x, e):
        own = slice(e * R, (e + 1) * R)
        return 1.7 * (b[:, own] @ (a[own] @ x))

    def reference(x, weights, onto):
        rows = []
        for t in range(T):
            active = [e for e in range(E) if weights[t, e] != 0]
            parts = gram_schmidt([output(x[t], e) for e in active])
            y = onto[t] + sum(weights[t, e] * u for e, u in zip(active, parts, strict=True))
            # Nothing yet, but a gradient for its weight.
            y = y + sum(weights[t, e] * output(x[t], e) for e in range(E) if e not in active)
            rows.append(y + sum(output(x[t], e) for e in range(E, E + num_shared)))
        return torch.stack(rows)

    check_mixture(bank, reference)


def test_it_differs_from_the_plain_mixture():
    bank, x, onto = make_bank(SPEC), hidden(), hidden(T, OUT)
    plain = EXPERTS.parse("lora").build(bank.size)
    for name in bank.factor_names:
        plain.factor(name).double().weight.data.copy_(bank.factor(name).weight.data)
    weights = routing_weights()
    assert not torch.allclose(dispatch(x, weights, bank, onto), dispatch(x, weights, plain, onto))
    alone = torch.zeros_like(weights)
    alone[:, 2] = 0.7
    assert_close(dispatch(x, alone, bank, onto), dispatch(x, alone, plain, onto))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_fresh_bank_changes_not_one_bit_and_trains_as_without(dtype):
    bank, plain = (make_bank(spec, init="zero_b") for spec in (SPEC, "lora"))
    grads = []
    x, onto, weights = hidden().to(dtype), hidden(T, OUT).to(dtype), routing_weights()
    for each in (bank, plain):
        for name in each.factor_names:
            each.factor(name).float().weight.data.copy_(bank.factor(name).weight.data)
        y = dispatch(x, weights, each, onto)
        assert torch.equal(y, onto)
        grads.append(torch.autograd.grad(y.float().sum(), each.factor("lora_B").weight)[0])
    assert grads[1].any()
    assert torch.equal(*grads)


@pytest.mark.parametrize("case", ["same", "opposite", "one_zero", "huge", "minute"])
def test_dependent_zero_and_extreme_outputs_stay_finite(case):
    bank = make_bank(SPEC)
    a, b = factors_of(bank)
    if case in ("same", "opposite"):
        a.data[R : 2 * R] = a.data[:R]
        b.data[:, R : 2 * R] = b.data[:, :R] * (1 if case == "same" else -1)
    elif case == "one_zero":
        b.data[:, :R] = 0
    else:
        b.data *= 1e150 if case == "huge" else 1e-150
    x, weights = hidden().requires_grad_(), torch.ones(T, E).double().requires_grad_()
    y = dispatch(x, weights, bank, torch.zeros(T, OUT).double())
    grads = torch.autograd.grad(y.sum(), [x, weights, a, b])
    assert y.isfinite().all()
    assert all(g.isfinite().all() for g in grads)
    if case in ("same", "opposite"):
        without = torch.ones(T, E).double()
        without[:, 1] = 0
        assert_close(y, dispatch(x, without, bank, torch.zeros(T, OUT).double()))


def test_an_unused_expert_that_overflowed_does_not_reach_the_others():
    bank = make_bank(SPEC)
    for name in bank.factor_names:
        bank.factor(name).half()
    bank.factor("lora_A").weight.data[:R] = 6e4
    weights = torch.ones(T, E)
    weights[:, 0] = 0
    assert dispatch(hidden().abs().half(), weights, bank, hidden(T, OUT).half()).isfinite().all()


def test_it_is_refused_in_an_ffn_with_the_reason():
    assert "FFN of its own" in EXPERTS.parse(SPEC).refusal("ffn")
    assert EXPERTS.parse(SPEC).refusal("linear") is None
    assert EXPERTS.parse("lora").refusal("ffn") is None
