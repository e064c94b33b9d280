"""Intervals and p-values against loops, known distributions and known roots."""

import itertools
import math
import random
from statistics import NormalDist

import pytest
import torch

from moeadapt.evaluation.bootstrap import (
    paired_difference,
    ratio_interval,
    resample,
    sign_flip_p,
    wilson_interval,
)


def draw(count, generator):
    """Rows of 1 to 8 tokens, whose loss per token is 2 on average: short rows are harder."""
    tokens = [float(generator.randint(1, 8)) for _ in range(count)]
    losses = [n * (2 + (4.5 - n) / 4) + generator.gauss(0, math.sqrt(n)) for n in tokens]
    return losses, tokens


# E[sum of losses] / E[tokens], by the sums over the eight lengths.
TRUE_RATIO = sum(n * (2 + (4.5 - n) / 4) for n in range(1, 9)) / sum(range(1, 9))


def slow_resample(columns, samples, seed):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(columns[0]), (samples, len(columns[0])), generator=generator).tolist()
    return [[sum(column[i] for i in rows) for rows in drawn] for column in columns]


def test_resampling_sums_the_same_rows_of_every_column():
    columns = [[random.Random(i).gauss(0, 1) for _ in range(7)] for i in range(3)]
    fast = resample(torch.tensor(columns, dtype=torch.float64), samples=11, seed=5)
    assert fast.tolist() == [pytest.approx(column) for column in slow_resample(columns, 11, 5)]


def test_many_rows_are_drawn_in_parts(monkeypatch):
    columns = torch.rand(2, 5, dtype=torch.float64)
    whole = resample(columns, samples=40, seed=1)
    monkeypatch.setattr("moeadapt.evaluation.bootstrap._CELLS", 15)
    torch.testing.assert_close(resample(columns, samples=40, seed=1), whole)


def test_the_interval_holds_the_true_ratio_as_often_as_it_says():
    """95 % nominal; of 300 intervals fewer than 90 % or all would be 4 standard errors away."""
    generator = random.Random(0)
    hits = 0
    for trial in range(300):
        found = ratio_interval(*draw(60, generator), seed=trial, samples=400)
        hits += found.low <= TRUE_RATIO <= found.high
    assert 0.90 <= hits / 300 < 0.99


def test_the_interval_is_as_wide_as_the_linearised_ratio_says():
    losses, tokens = draw(400, random.Random(1))
    ratio = sum(losses) / sum(tokens)
    spread = sum((loss - ratio * n) ** 2 for loss, n in zip(losses, tokens, strict=True))
    error = math.sqrt(spread) / sum(tokens)
    found = ratio_interval(losses, tokens)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.06)
    assert (found.high + found.low) / 2 == pytest.approx(ratio, abs=0.2 * error)


def test_the_same_seed_gives_the_same_interval():
    given = draw(20, random.Random(2))
    assert ratio_interval(*given, seed=3) == ratio_interval(*given, seed=3)
    assert ratio_interval(*given, seed=3) != ratio_interval(*given, seed=4)


def test_one_row_has_no_spread():
    assert ratio_interval([2.0], [1.0]) is None
    found = paired_difference([2.0], [3.0], [2.0])
    assert (found.value, found.interval, found.p) == (0.5, None, 1.0)


def test_a_true_difference_that_is_smaller_than_the_spread_of_rows_is_found():
    generator = random.Random(3)
    first, tokens = draw(100, generator)
    second = [a + 0.1 * n + generator.gauss(0, 0.2) for a, n in zip(first, tokens, strict=True)]
    alone = ratio_interval(first, tokens)
    found = paired_difference(first, second, tokens)
    assert found.value < alone.high - alone.low
    assert 0 < found.interval.low < found.value < found.interval.high
    assert found.p == 1 / 4001
    back = paired_difference(second, first, tokens)
    assert (back.value, back.p) == (pytest.approx(-found.value), found.p)


def test_equal_arms_have_no_difference():
    losses, tokens = draw(30, random.Random(4))
    found = paired_difference(losses, losses, tokens)
    assert (found.value, found.interval.low, found.interval.high, found.p) == (0.0, 0.0, 0.0, 1.0)


def test_p_is_below_a_twentieth_in_a_twentieth_of_the_cases_without_a_difference():
    """Of 300, the share below 0.05 is 0.05 with a standard error of 0.013."""
    generator = random.Random(5)
    small = 0
    for trial in range(300):
        first, tokens = draw(60, generator)
        second = [loss + generator.gauss(0, 1) for loss in first]
        small += paired_difference(first, second, tokens, seed=trial, samples=400).p < 0.05
    assert 0.01 <= small / 300 <= 0.10


@pytest.mark.parametrize("rows", [2, 3, 5, 8])
def test_few_rows_without_a_difference_are_seldom_significant(rows):
    """An exact test: in at most 5 % of trials. Of 400, 9 % would be 4 standard errors away."""
    generator = random.Random(rows)
    small = 0
    for _ in range(400):
        first, tokens = draw(rows, generator)
        second = [loss + generator.gauss(0, 1) for loss in first]
        found = paired_difference(first, second, tokens, samples=10)
        small += found.p <= 0.05
        assert found.p >= 2.0 ** (1 - rows)
        assert (found.interval is None) == (rows < 8)
    assert small / 400 < 0.09


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 12])
def test_rows_that_all_agree_have_the_smallest_p_of_their_number(rows):
    first = [2.0 + 0.1 * row for row in range(rows)]
    second = [loss - 0.5 - 0.1 * row for row, loss in enumerate(first)]
    assert paired_difference(first, second, [1.0] * rows).p == 2.0 ** (1 - rows)


def test_counted_flips_are_those_of_a_loop_and_sampled_ones_come_near(monkeypatch):
    generator = random.Random(6)
    values = [generator.gauss(0.4, 1) for _ in range(9)]
    far = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True))) >= abs(sum(values)) - 1e-9
        for signs in itertools.product((1, -1), repeat=9)
    ]
    given = torch.tensor(values, dtype=torch.float64)
    exact = sign_flip_p(given)
    assert exact == sum(far) / 512
    assert 0.02 < exact < 0.98
    monkeypatch.setattr("moeadapt.evaluation.bootstrap.MOST_EXACT", 8)
    error = math.sqrt(exact * (1 - exact) / 4000)
    assert sign_flip_p(given) == pytest.approx(exact, abs=4 * error)


@pytest.mark.parametrize(("hits", "number"), [(1, 10), (5, 10), (37, 41)])
def test_wilsons_bounds_are_where_the_normal_test_just_rejects(hits, number):
    z = NormalDist().inv_cdf(0.975)
    found = wilson_interval(hits, number)
    for bound in (found.low, found.high):
        distance = abs(hits / number - bound)
        assert distance == pytest.approx(z * math.sqrt(bound * (1 - bound) / number))
    assert found.low < hits / number < found.high


def test_wilsons_interval_ends_at_none_and_all():
    none, every = wilson_interval(0, 8), wilson_interval(8, 8)
    assert (none.low, every.high) == (0.0, 1.0)
    z2 = NormalDist().inv_cdf(0.975) ** 2
    assert none.high == pytest.approx(z2 / (8 + z2))
    assert every.low == pytest.approx(8 / (8 + z2))
