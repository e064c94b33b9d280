"""The search for an arm's learning rate: a walk on a grid that stops where both sides are worse."""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar


class Scored(Protocol):
    """Anything with a validation loss."""

    validation: float


T = TypeVar("T", bound=Scored)


def climb(run: Callable[[float], T], rates: Sequence[float]) -> tuple[T, dict[float, float]]:
    """Return the run with the lowest validation loss, and the loss of each rate that was tried.

    Starts with the two rates in the middle and goes to the better side. The rates beside the
    chosen one have both been tried and were worse, unless it is the first or the last.

    Args:
        run: trains and validates at a rate; only the best run is kept.
        rates: in rising order, at least one.
    """
    middle = (len(rates) - 1) // 2
    best, at = run(rates[middle]), middle
    losses = {rates[middle]: best.validation}
    for side in (1, -1):
        while 0 <= at + side < len(rates) and rates[at + side] not in losses:
            other = run(rates[at + side])
            losses[rates[at + side]] = other.validation
            # A NaN is never better.
            if not other.validation < best.validation:
                break
            best, at = other, at + side
    return best, losses
