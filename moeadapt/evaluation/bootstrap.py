"""Intervals and p-values: the bootstrap over rows, and Wilson's interval of a share.

Letters: C columns, N rows, S samples of the bootstrap.

Sources: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapters 13 (percentile
interval) and 15 (achieved significance level); Koehn 2004, https://aclanthology.org/W04-3250
(pairs of systems on the same rows); Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953.
"""

import math
from statistics import NormalDist

import torch
from jaxtyping import Float
from torch import Tensor

from moeadapt.evaluation.results import Difference, Interval

SAMPLES = 4000
"""Samples of the bootstrap; the smallest p it can give is 2 / (SAMPLES + 1)."""

LEVEL = 0.95

_CELLS = 2**22
"""Rows times samples that are drawn at once: 32 MiB."""


def resample(
    columns: Float[Tensor, "C N"], *, samples: int = SAMPLES, seed: int = 0
) -> Float[Tensor, "C S"]:
    """Sum the columns over N rows drawn with replacement, the same rows for every column.

    Args:
        columns: one number per row and column.
        samples: how often N rows are drawn.
        seed: the same seed draws the same rows.
    """
    number = columns.shape[1]
    generator = torch.Generator().manual_seed(seed)
    values_CN = columns.detach().cpu().double()
    sums = []
    for start in range(0, samples, step := max(_CELLS // number, 1)):
        size = (min(step, samples - start), number)
        drawn_SN = torch.randint(number, size, generator=generator)
        times_SN = torch.zeros(size, dtype=torch.float64)
        times_SN.scatter_add_(1, drawn_SN, torch.ones_like(times_SN))
        sums.append(values_CN @ times_SN.T)
    return torch.cat(sums, 1)


def ratio_interval(
    part: list[float], whole: list[float], *, seed: int = 0, samples: int = SAMPLES
) -> Interval | None:
    """Return the interval of sum(part) / sum(whole) over rows; None for a single row.

    It is the percentile interval, which is a little narrow for few rows.
    """
    if len(part) < 2:  # noqa: PLR2004
        return None
    sums_CS = resample(_columns(part, whole), samples=samples, seed=seed)
    return _percentiles(sums_CS[0] / sums_CS[1])


def paired_difference(
    first: list[float],
    second: list[float],
    whole: list[float],
    *,
    seed: int = 0,
    samples: int = SAMPLES,
) -> Difference:
    """Compare sum(second) / sum(whole) with sum(first) / sum(whole), row by row.

    p is twice the smaller share of samples on either side of 0, samples at 0 on both sides, and the
    observed data counted as one more sample, so that it is never 0.
    """
    columns = _columns([b - a for a, b in zip(first, second, strict=True)], whole)
    value = float(columns[0].sum() / columns[1].sum())
    if len(first) < 2:  # noqa: PLR2004
        return Difference(value=value, interval=None, p=1.0)
    sums_CS = resample(columns, samples=samples, seed=seed)
    differences_S = sums_CS[0] / sums_CS[1]
    side = min(int((differences_S <= 0).sum()), int((differences_S >= 0).sum()))
    p = min(2 * (side + 1) / (samples + 1), 1.0)
    return Difference(value=value, interval=_percentiles(differences_S), p=p)


def wilson_interval(hits: int, number: int) -> Interval:
    """Return Wilson's interval of the share hits / number, within 0 and 1; `number` is >= 1.

    Example:
        >>> wilson_interval(0, 10).low
        0.0
    """
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    share, spread = hits / number, z * z / number
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / number + spread / (4 * number))
    # At the ends the exact bound is the share itself, which rounding may miss.
    low = 0.0 if hits == 0 else max(middle - half, 0.0)
    high = 1.0 if hits == number else min(middle + half, 1.0)
    return Interval(low=low, high=high)


def _columns(*columns: list[float]) -> Float[Tensor, "C N"]:
    return torch.tensor(columns, dtype=torch.float64)


def _percentiles(values_S: Float[Tensor, " S"]) -> Interval:
    tail = (1 - LEVEL) / 2
    low, high = values_S.quantile(torch.tensor([tail, 1 - tail], dtype=values_S.dtype)).tolist()
    return Interval(low=low, high=high)
