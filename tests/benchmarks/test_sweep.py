"""The search for a learning rate: the walk, and which seeds it asks."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.evidence.sweep import choose_rate


class Search:
    """Runs of which only the validation loss is known: `loss(rate, seed)`."""

    def __init__(self, loss):
        self.loss, self.seen = loss, []

    def __call__(self, rate: float, seed: int) -> SimpleNamespace:
        self.seen.append((rate, seed))
        return SimpleNamespace(rate=rate, seed=seed, validation=self.loss(rate, seed))


@pytest.mark.parametrize("best", [0, 1, 2, 3, 4, 5])
def test_the_rate_is_searched_until_both_sides_are_worse(best):
    # The largest rate diverges.
    run = Search(lambda rate, _: abs(rate - best) if rate < 5 or best == 5 else torch.nan)
    found, tried = choose_rate(run, range(6), seeds=3, searched=2)
    assert [(one.rate, one.seed) for one in found] == [(best, 0), (best, 1), (best, 2)]
    assert {max(best - 1, 0), min(best + 1, 5)} <= set(tried)
    assert len(run.seen) == len(set(run.seen))


def test_a_rate_that_one_seed_alone_likes_is_not_chosen():
    # The larger rate is the better one for the first seed; another one diverges.
    losses = {1.0: (2.5, 2.5, 2.5), 2.0: (2.0, 2.0, 2.0), 3.0: (1.9, 9.0, 2.0)}
    found, tried = choose_rate(Search(lambda rate, seed: losses[rate][seed]), (1.0, 2.0, 3.0), 3)
    assert [(one.rate, one.seed) for one in found] == [(2.0, 0), (2.0, 1), (2.0, 2)]
    # A rate is given up as soon as it is plain that it is worse.
    assert tried == {1.0: [2.5], 2.0: [2.0] * 3, 3.0: [1.9, 9.0]}


def test_a_rate_that_is_a_little_worse_is_run_with_every_seed():
    losses = {1.0: (2.2, 2.2, 1.0), 2.0: (2.0, 2.0, 2.0)}
    found, tried = choose_rate(Search(lambda rate, seed: losses[rate][seed]), (1.0, 2.0), 3)
    assert [one.rate for one in found] == [1.0] * 3
    assert tried[2.0] == [2.0] * 3


@pytest.mark.parametrize("diverging", [(3.0,), (2.0, 3.0), (2.0, 3.0, 4.0, 5.0)])
def test_a_run_that_diverges_never_wins(diverging):
    run = Search(lambda rate, _: torch.nan if rate in diverging else rate)
    found, _ = choose_rate(run, (1.0, 2.0, 3.0, 4.0, 5.0), 2)
    assert [one.rate for one in found] == [1.0, 1.0]


def test_a_rate_that_diverges_with_one_seed_is_not_kept_for_the_others():
    losses = {1.0: (2.5, 2.5, 2.5), 2.0: (2.0, 2.0, torch.nan), 3.0: (9.0, 9.0, 9.0)}
    found, tried = choose_rate(Search(lambda rate, seed: losses[rate][seed]), (1.0, 2.0, 3.0), 3)
    assert [one.rate for one in found] == [1.0] * 3
    assert tried[1.0] == [2.5] * 3
