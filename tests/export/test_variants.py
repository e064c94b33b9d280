"""How experts differ from their FFN: noise, new units, parts."""

import pytest
import torch
from torch.nn.functional import silu
from torch.testing import assert_close

from moeadapt.errors import ConfigError
from moeadapt.export.dense import Glu
from moeadapt.export.variants import Variation, part, vary

D, I = 37, 2000  # noqa: E741


def ffn(width=I):
    generator = torch.Generator().manual_seed(0)
    gate, up = (2 + 0.3 * torch.randn(width, D, generator=generator) for _ in range(2))
    return Glu(gate, up, -1 + 0.5 * torch.randn(D, width, generator=generator))


def apply(glu, x):
    return (silu(x @ glu.gate.T) * (x @ glu.up.T)) @ glu.down.T


def test_nothing_asked_changes_nothing():
    own = ffn()
    assert vary(own, Variation(), torch.Generator()) is own


def test_noise_has_the_share_of_the_deviation_that_was_asked_for():
    found = vary(Glu(*(m.clone() for m in ffn())), Variation(noise=0.25), torch.Generator())
    for matrix, old in zip(found, ffn(), strict=True):
        ratio = (matrix - old).std() / old.std()
        assert abs(ratio - 0.25) < 0.01


def test_drop_draws_the_same_units_anew_in_all_three_matrices_and_keeps_the_rest():
    own = Glu(*(m.clone() for m in ffn()))
    found = vary(own, Variation(drop=0.3), torch.Generator().manual_seed(1))
    changed = [(a != b).any(axis) for a, b, axis in zip(found, ffn(), (1, 1, 0), strict=True)]
    assert changed[0].sum() == 600
    assert torch.equal(changed[0], changed[1])
    assert torch.equal(changed[0], changed[2])
    for matrix, old, axis in zip(found, ffn(), (0, 0, 1), strict=True):
        units = changed[0].nonzero().flatten()
        new, gone = matrix.index_select(axis, units), old.index_select(axis, units)
        assert abs(new.mean() - gone.mean()) < 0.02
        assert abs(new.std() / gone.std() - 1) < 0.02


@pytest.mark.parametrize("granularity", [1, 2, 5])
def test_the_mean_of_the_parts_is_the_ffn(granularity):
    own = Glu(*(m.double() for m in ffn(20)))
    x = torch.randn(7, D, dtype=torch.float64)
    parts = [apply(part(own, i, granularity), x) for i in range(granularity)]
    assert_close(sum(parts) / granularity, apply(own, x))


@pytest.mark.parametrize(
    "fields", [{"noise": float("nan")}, {"noise": -1.0}, {"drop": 1.1}, {"granularity": 0}]
)
def test_settings_out_of_range_are_refused(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        Variation(**fields)
