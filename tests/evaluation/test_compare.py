"""Two arms on the same rows: domains apart, other rows refused."""

from dataclasses import replace

import pytest

from moeadapt.errors import ConfigError
from moeadapt.evaluation import Evaluation, RowScore, compare
from moeadapt.evaluation.run import summarise


def arm(losses, exact=None, keys=None):
    rows = tuple(
        RowScore(
            key=str(i) if keys is None else keys[i],
            domain="ab"[i % 2],
            nll=loss,
            tokens=1 + i % 3,
            exact=None if exact is None else exact[i],
        )
        for i, loss in enumerate(losses)
    )
    return Evaluation(
        overall=summarise(rows), by_domain={}, rows=rows, truncated=0, max_length=9, seed=0
    )


FIRST = [float(5 + (7 * i) % 11) for i in range(40)]
BETTER = [loss - (1.0 if i % 2 else 0.0) for i, loss in enumerate(FIRST)]


def test_a_domain_that_gets_better_is_found_and_the_other_is_not():
    found = compare(arm(FIRST), arm(BETTER))
    tokens = [1 + i % 3 for i in range(40)]
    assert found.nll.value == pytest.approx(-20 / sum(tokens))
    assert found.nll_by_domain["b"].value == pytest.approx(-20 / sum(tokens[1::2]))
    assert found.nll.p < 0.01
    assert found.nll_by_domain["b"].p < 0.01
    assert (found.nll_by_domain["a"].value, found.nll_by_domain["a"].p) == (0.0, 1.0)
    assert (found.rows, found.exact, found.exact_by_domain) == (40, None, {})


def test_shares_of_exact_answers_are_compared_too():
    none, some = [False] * 40, [i % 4 == 1 for i in range(40)]
    found = compare(arm(FIRST, none), arm(FIRST, some))
    assert found.exact.value == pytest.approx(0.25)
    assert found.exact.p < 0.01
    assert found.exact_by_domain["a"].p == 1.0
    assert found.exact_by_domain["b"].value == pytest.approx(0.5)


def test_an_arm_without_answers_leaves_them_out():
    assert compare(arm(FIRST, [True] * 40), arm(FIRST)).exact is None


def test_the_result_is_json_with_the_rows_counted():
    data = compare(arm(FIRST), arm(BETTER)).to_json()
    assert data["rows"] == 40
    assert data["nll"]["interval"]["high"] < 0
    assert data["exact"] is None


def test_other_rows_are_refused():
    keys = [str(i) for i in range(40)]
    swapped = [keys[1], keys[0], *keys[2:]]
    other = [*keys[:-1], "else"]
    with pytest.raises(ConfigError, match="different rows: 40 and 40, 39 of them in both;"):
        compare(arm(FIRST), arm(FIRST, keys=other))
    with pytest.raises(ConfigError, match="40 of them in both, in another order"):
        compare(arm(FIRST), arm(FIRST, keys=swapped))
    with pytest.raises(ConfigError, match="different rows: 40 and 39"):
        compare(arm(FIRST), arm(FIRST[:-1]))


def test_rows_that_were_split_into_other_tokens_are_refused():
    first = arm(FIRST)
    rows = (*first.rows[:-1], replace(first.rows[-1], tokens=9))
    with pytest.raises(ConfigError, match="row 40 has 1 tokens to score in one arm and 9"):
        compare(first, replace(first, rows=rows))
