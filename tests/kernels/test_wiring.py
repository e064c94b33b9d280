"""Models use the kernels when they are asked for, and compute the same."""

import pytest

from tests.kernels import wiring_checks

FIELDS = {
    "default": {},
    "shared_expert": {"n_shared": 1},
    "k_1": {"router": {"name": "top_k", "k": 1, "normalize": "none"}},
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_a_training_step_with_kernels_is_the_one_without(on, fields):
    on(wiring_checks.check_a_training_step, fields)


def test_a_model_in_float64_is_refused(on):
    assert "float64" in on(wiring_checks.refusal_in_float64)
