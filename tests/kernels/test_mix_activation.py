"""The kernels of the FFN mixture agree with their definition, forward and backward."""

import pytest
import torch
from torch.nn import functional as F

from moeadapt.kernels.reference import BASE, SHARED, mix_activation_reference
from tests.kernels import mix_checks
from tests.kernels.mix_checks import Case

routed_k = pytest.mark.parametrize("k", [1, 2, 4])
dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])

SIZES = {
    "in_chunks": Case(chunk=16),
    "one_token": Case(tokens=1),
    "several_tiles": Case(tokens=33, width=100, rank=16, chunk=20),
    "as_wide_as_its_ranks": Case(width=18),
    "aligned": Case(tokens=32, width=64, rank=4, shared=0, experts=4),
    "gate_without_experts": Case(without="gate"),
    "up_without_experts": Case(without="up"),
    "down_without_experts": Case(without="down"),
    "two_shared": Case(shared=2, k=1),
}


@routed_k
@dtypes
def test_outputs_and_gradients_are_those_of_the_reference(on, k, dtype):
    on(mix_checks.check_values, Case(k=k, dtype=dtype))


@pytest.mark.parametrize("case", SIZES.values(), ids=SIZES)
def test_they_are_for_other_sizes_too(on, case):
    on(mix_checks.check_values, case)


@pytest.mark.gpu
@routed_k
@dtypes
def test_they_are_for_the_sizes_of_a_model(on, k, dtype):
    case = Case(k=k, dtype=dtype, tokens=1031, width=5632, rank=16, experts=8, chunk=512)
    on(mix_checks.check_values, case)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_columns_of_experts_not_chosen_may_overflow(on, dtype):
    on(mix_checks.check_columns_that_are_off, dtype)


@dtypes
def test_experts_that_change_nothing_leave_the_activation_whatever_the_weights(on, dtype):
    on(mix_checks.check_experts_that_change_nothing, dtype)


def test_frozen_factors_get_no_gradient(on):
    on(mix_checks.check_frozen_factors, "float32")


def test_float32_adapters_compute_in_the_type_of_the_base(on):
    on(mix_checks.check_other_types, "bfloat16")


@routed_k
def test_two_activations_are_kept_for_backward_whatever_k(on, k):
    assert 2 <= on(mix_checks.saved_for_backward, k) <= 2.1


def test_double_precision_is_refused(on):
    message = on(mix_checks.check_refusal, "float64")
    assert "bfloat16, float16, float32, not in torch.float64" in message


def test_the_reference_is_each_experts_ffn_token_by_token():
    case = Case(dtype="float64", k=3)
    (gate, up, hg, hu, bg, bu, ad, w), (experts, *owners) = mix_checks.problem("cpu", case)
    w = w.double()
    mix, gated = mix_activation_reference(gate, up, hg, hu, bg, bu, ad, w, experts, *owners)
    for t in range(case.tokens):
        row, inner = torch.zeros_like(mix[t]), torch.zeros_like(gated[t])
        for j in range(case.k):
            used = {SHARED, experts[j, t].item()} - {BASE}
            g, u, d = (torch.tensor([o in used for o in owner.tolist()]) for owner in owners)
            activation = F.silu(gate[t] + bg[:, g] @ hg[t, g]) * (up[t] + bu[:, u] @ hu[t, u])
            row = row + w[j, t] * activation
            inner[d] = inner[d] + w[j, t] * (ad[d] @ activation)
        torch.testing.assert_close(mix[t], row)
        torch.testing.assert_close(gated[t], inner)
