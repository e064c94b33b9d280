"""The search for the learning rate of an arm: a walk on a grid, by loss over several seeds."""

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Protocol, TypeVar

GIVE_UP = 0.3
"""A rate whose loss is so much larger over the seeds run so far is not run with the others."""


class Scored(Protocol):
    """Anything with a validation loss."""

    @property
    def validation(self) -> float:
        """The loss."""
        ...


T = TypeVar("T", bound=Scored)


def choose_rate(
    run: Callable[[float, int], T], rates: Sequence[float], seeds: int, searched: int | None = None
) -> tuple[list[T], dict[float, list[float]]]:
    """Return a run of each seed at the best rate, and the validation losses of each rate tried.

    Starts in the middle and goes to the better side, until the rates on both sides of the best one
    are worse or there are none. One seed alone may like a rate at which others diverge: rates are
    compared over the same seeds. A loss that is not finite is never better.

    Args:
        run: trains and validates at a rate with a seed.
        rates: in rising order, at least one.
        seeds: how many, counted from 0.
        searched: the first so many choose the rate; all if left out.
    """
    searched = seeds if searched is None else min(searched, seeds)
    at = (len(rates) - 1) // 2
    best = [run(rates[at], seed) for seed in range(searched)]
    tried = {rates[at]: [one.validation for one in best]}
    # Where the middle diverges, larger rates do too.
    for side in (1, -1) if math.isfinite(_mean(tried[rates[at]])) else (-1,):
        while 0 <= at + side < len(rates) and rates[at + side] not in tried:
            rate = rates[at + side]
            known = tried[rates[at]]
            other = _race(run, rate, known)
            tried[rate] = [one.validation for one in other]
            if _mean(tried[rate]) >= _mean(known[: len(other)]) and math.isfinite(_mean(known)):
                break
            at, best = at + side, other
    rate = rates[at]
    best += [run(rate, seed) for seed in range(len(best), seeds)]
    tried[rate] = [one.validation for one in best]
    return best, tried


def _race(run: Callable[[float, int], T], rate: float, known: Sequence[float]) -> list[T]:
    """Run the seeds of `known`, the losses to beat, until it is plain that they are not beaten."""
    found: list[T] = []
    for seed in range(len(known)):
        found.append(run(rate, seed))
        own = _mean([one.validation for one in found])
        if math.isfinite(_mean(known)) and own > _mean(known[: seed + 1]) + GIVE_UP:
            break
    return found


def _mean(losses: Sequence[float]) -> float:
    mean = fmean(losses)
    return mean if math.isfinite(mean) else math.inf
