"""The kernels of the top-k gate agree with its definition, forward and backward."""

import pytest

from tests.kernels import gate_checks

sizes = pytest.mark.parametrize("experts", [1, 3, 8, 9, 64])
kinds = pytest.mark.parametrize("kind", ["plain", "tied", "hidden"])
renorms = pytest.mark.parametrize("renorm", [True, False], ids=["renorm", "plain"])


@sizes
@pytest.mark.parametrize("k", [1, 2, 4])
@renorms
def test_outputs_and_gradients_are_those_of_the_reference(on, experts, k, renorm):
    on(gate_checks.check_values, 37, experts, k, "plain", renorm, True)


@kinds
@pytest.mark.parametrize("experts", [3, 64])
@pytest.mark.parametrize("masked", [True, False], ids=["padding", "all_real"])
def test_equal_and_hidden_logits_are_treated_as_in_the_reference(on, experts, kind, masked):
    on(gate_checks.check_values, 37, experts, 2, kind, True, masked)


@pytest.mark.parametrize("tokens", [0, 1, 128, 1031])
def test_any_number_of_tokens_is_counted(on, tokens):
    on(gate_checks.check_values, tokens, 16, 2, "plain", True, True)


@pytest.mark.parametrize("name", ["weights", "probs", "sums"])
def test_each_output_carries_its_own_gradient(on, name):
    on(gate_checks.check_one_output_alone, name)


def test_two_runs_agree_bit_by_bit(on):
    on(gate_checks.check_two_runs)


@pytest.mark.parametrize(("dtype", "experts"), [("float64", 8), ("bfloat16", 8), ("float32", 65)])
def test_other_logits_are_refused(on, dtype, experts):
    message = on(gate_checks.refusal, dtype, experts)
    assert f"float32 logits of up to 64 experts, not torch.{dtype} of {experts}" in message
