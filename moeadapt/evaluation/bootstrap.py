"""Intervals by the bootstrap over rows, p-values by flipped signs, Wilson's interval of a share.

Letters: C columns, N rows, S samples of the bootstrap, F flips.

Sources: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13 (percentile
interval); Fisher 1935, The Design of Experiments, section 21 (signs of paired differences);
Phipson and Smyth 2010, https://doi.org/10.2202/1544-6115.1585 (p of sampled permutations); Koehn
2004, https://aclanthology.org/W04-3250
(pairs of systems on the same rows); Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953.
"""

import math
from statistics import NormalDist

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moeadapt.evaluation.results import Difference, Interval

SAMPLES = 4000
"""Samples of the bootstrap, and of signs; the smallest p these can give is 1 / (SAMPLES + 1)."""

LEAST_ROWS = 8
"""Rows below which the difference has no interval: a bootstrap over so few is far too narrow."""

MOST_EXACT = 12
"""Rows up to which all 2^N ways of flipping signs are counted, 4096 at most."""

_ROUNDING = 1e-9
"""Two sums may differ by this share of the sum of all sizes and are equal."""

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

    p asks how often the sum of the differences would be as far from 0 if the sign of each row's
    difference were a coin's: exact up to `MOST_EXACT` rows, sampled beyond. It cannot be smaller
    than 2^(1 - N), so that two rows never show anything. The interval is a bootstrap's, which is a
    little narrow for few rows; where the two disagree, go by p.
    """
    columns = _columns([b - a for a, b in zip(first, second, strict=True)], whole)
    value = float(columns[0].sum() / columns[1].sum())
    p = sign_flip_p(columns[0], samples=samples, seed=seed)
    if len(first) < LEAST_ROWS:
        return Difference(value=value, interval=None, p=p)
    sums_CS = resample(columns, samples=samples, seed=seed)
    return Difference(value=value, interval=_percentiles(sums_CS[0] / sums_CS[1]), p=p)


def sign_flip_p(values: Float[Tensor, " N"], *, samples: int = SAMPLES, seed: int = 0) -> float:
    """Return the share of flips of signs whose sum is at least as far from 0, two-sided.

    Args:
        values: differences of pairs.
        samples: flips that are drawn where there are too many to count them all.
        seed: of the draws.

    Example:
        >>> sign_flip_p(torch.tensor([1.0, 2.0]))
        0.5
    """
    number = len(values)
    least = float(values.sum().abs() - _ROUNDING * values.abs().sum())
    if number <= MOST_EXACT:
        flips_FN = torch.arange(2**number).unsqueeze(1) >> torch.arange(number) & 1
        return float((_flipped(values, flips_FN).abs() >= least).double().mean())
    generator = torch.Generator().manual_seed(seed)
    reached = 1  # the observed data are one of the flips
    for start in range(0, samples, step := max(_CELLS // number, 1)):
        size = (min(step, samples - start), number)
        flips_FN = torch.randint(2, size, generator=generator)
        reached += int((_flipped(values, flips_FN).abs() >= least).sum())
    return reached / (samples + 1)


def _flipped(values: Float[Tensor, " N"], flips_FN: Int[Tensor, "F N"]) -> Float[Tensor, " F"]:
    return (1 - 2 * flips_FN).to(values.dtype) @ values


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
