"""Experts that share their A or their B."""

import pytest
import torch
from torch.testing import assert_close

from moeadapt.dispatch import dispatch
from tests.experts.kit import check_mixture, routing_weights
from tests.samples import OUT, D, E, R, T, hidden, make_bank


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pairs(bank):
    a, b = (bank.factor(n).weight for n in ("lora_A", "lora_B"))
    experts = range(bank.size.total_experts)
    own = [slice(e * R, (e + 1) * R) for e in experts]
    if a.shape[0] == R:
        return [(a, b[:, s]) for s in own]
    return [(a[s], b) for s in own]


@pytest.mark.parametrize("kind", ["shared_a", "shared_b"])
@pytest.mark.parametrize("num_shared", [0, 2])
def test_the_mixture_is_the_sum_over_pairs(kind, num_shared):
    bank = make_bank(kind, num_shared=num_shared)

    def reference(x, weights, onto):
        y = onto
        for e, (a, b) in enumerate(pairs(bank)):
            w = weights[:, e : e + 1] if e < E else 1.0
            y = y + 1.7 * w * (x @ a.T @ b.T)
        return y

    check_mixture(bank, reference)


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [("shared_a", [(R, D), (OUT, E * R)]), ("shared_b", [(E * R, D), (OUT, R)])],
)
def test_one_matrix_is_kept_once(kind, shapes):
    bank = make_bank(kind)
    assert [tuple(bank.factor(n).weight.shape) for n in bank.factor_names] == shapes


def test_a_shared_a_projects_once():
    x = hidden()
    assert make_bank("shared_a").down(x).shape == (T, R)


@pytest.mark.parametrize("kind", ["shared_a", "shared_b"])
@pytest.mark.parametrize("init", ["zero_b", "gaussian", "orthogonal"])
def test_a_fresh_bank_adds_nothing_and_trains_b(kind, init):
    bank, x, onto = make_bank(kind, init=init), hidden(), hidden(T, OUT)
    y = dispatch(x, routing_weights(), bank, onto)
    assert torch.equal(y, onto)
    assert torch.autograd.grad(y.sum(), bank.factor("lora_B").weight)[0].any()


@pytest.mark.parametrize("kind", ["shared_a", "shared_b"])
def test_in_float16_an_unused_expert_may_overflow(kind):
    bank = make_bank(kind)
    for name in bank.factor_names:
        bank.factor(name).half()
    if kind == "shared_b":
        bank.factor("lora_A").weight.data[:R] = 6e4
    weights = routing_weights()
    weights[:, 0] = 0
    x = hidden().abs().half()
    assert dispatch(x, weights, bank, hidden(T, OUT).half()).isfinite().all()


def test_the_orthogonal_start_has_orthogonal_rows_across_experts():
    bank = make_bank("lora", in_features=E * R + 2, init="orthogonal")
    a = bank.factor("lora_A").weight
    assert_close(a @ a.T, torch.eye(E * R, dtype=a.dtype) / 3, atol=1e-6, rtol=0)


def test_more_rows_than_features_are_orthogonal_in_groups():
    bank = make_bank("lora", in_features=5, init="orthogonal")
    a = bank.factor("lora_A").weight
    for rows in a.split(5):
        square = rows @ rows.T
        assert_close(square, torch.eye(len(rows), dtype=a.dtype) / 3, atol=1e-6, rtol=0)
