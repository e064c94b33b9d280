"""The search for an arm's learning rate, by validation loss: a walk on a grid, then a final."""

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Protocol, TypeVar

FINALISTS = 2
"""Rates that are run with every seed: one seed alone may like a rate at which others diverge."""


class Scored(Protocol):
    """Anything with a validation loss."""

    validation: float


T = TypeVar("T", bound=Scored)


def climb(run: Callable[[float], T], rates: Sequence[float]) -> dict[float, T]:
    """Return the run of each rate that was tried.

    Starts with the two rates in the middle and goes to the better side. The rates beside the best
    one have both been tried and are worse, unless it is the first or the last.

    Args:
        run: trains and validates at a rate.
        rates: in rising order, at least one.
    """
    at = (len(rates) - 1) // 2
    runs = {rates[at]: run(rates[at])}
    for side in (1, -1):
        while 0 <= at + side < len(rates) and rates[at + side] not in runs:
            other = runs[rates[at + side]] = run(rates[at + side])
            # A NaN is never better.
            if not other.validation < runs[rates[at]].validation:
                break
            at += side
    return runs


def choose_rate(
    run: Callable[[float, int], T], rates: Sequence[float], seeds: int
) -> tuple[list[T], dict[float, list[float]]]:
    """Return a run of each seed at the best rate, and the validation losses of each rate tried.

    The first seed climbs; the best `FINALISTS` are run with all seeds, and the lowest mean wins.

    Args:
        run: trains and validates at a rate with a seed.
        rates: in rising order, at least one.
        seeds: how many, counted from 0.
    """
    climbed = climb(lambda rate: run(rate, 0), rates)
    tried = {rate: [one.validation] for rate, one in climbed.items()}
    order = sorted(tried, key=lambda rate: _or_infinite(tried[rate][0]))
    final = {rate: [climbed[rate]] for rate in order[:FINALISTS]}
    del climbed  # the models of the others are not needed any more
    for rate, runs in final.items():
        runs += [run(rate, seed) for seed in range(1, seeds)]
        tried[rate] = [one.validation for one in runs]
    best = min(final, key=lambda rate: _or_infinite(fmean(tried[rate])))
    return final[best], tried


def _or_infinite(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss
