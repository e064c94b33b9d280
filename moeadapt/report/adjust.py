"""p-values of many tests at once, adjusted so that few of the small ones are chance.

Source: Benjamini and Hochberg 1995, https://doi.org/10.1111/j.2517-6161.1995.tb02031.x.
"""

import math
from collections.abc import Sequence

LEVEL = 0.05
"""Chance of a p value up to here where there is nothing to find."""


def adjusted(p_values: Sequence[float]) -> list[float]:
    """Return p-values by Benjamini and Hochberg: of those up to x, a share of x is chance at most.

    Args:
        p_values: of all tests that are looked at together; what is no number was no test and stays.

    Example:
        >>> adjusted([0.01, 0.04, 0.03, 0.5])
        [0.04, 0.05333333333333334, 0.05333333333333334, 0.5]
    """
    tests = sorted((p, index) for index, p in enumerate(p_values) if math.isfinite(p))
    found = [float(p) for p in p_values]
    least = 1.0
    for rank, (p, index) in reversed(list(enumerate(tests, 1))):
        least = min(least, p * len(tests) / rank)
        found[index] = least
    return found
