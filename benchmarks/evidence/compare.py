"""Reads the rows of the evidence, and says which arm is better by the numbers alone.

A difference of two arms is that of their runs with one seed, which share rows, worlds and order.
One that Student's paired t test does not tell from zero at 5 % is called within noise.
"""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence.rows import mean_and_error

Row = dict[str, str]

BASELINE = "the baseline"
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom."""

_ONE_RUN = (
    "steps", "seeds", "batch", "model_id", "device", "base_nll", "base_text_nll", "train_rows",
    "validation_rows", "test_rows", "texts",
)  # fmt: skip
"""What rows must agree in to be compared; files have some of these columns."""


def read(path: Path, keys: Sequence[str]) -> list[Row]:
    """Return the last row of each arm, in the order of the file; empty if there is no file.

    Raises:
        SystemExit: rows were measured in different ways.
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    last = list({tuple(row[key] for key in keys): row for row in rows}.values())
    for name in _ONE_RUN:
        found = sorted({row[name] for row in last if name in row})
        if len(found) > 1:
            raise SystemExit(
                f"{path} mixes runs of different {name}: {', '.join(found)}; measure all arms in "
                "one way, and take the rows of the others out"
            )
    return last


def baseline(rows: Sequence[Row], key: str, name: str) -> Row:
    """Return the row of the plain LoRA that all are compared with."""
    for row in rows:
        if row[key] == name:
            return row
    raise SystemExit(f"there is no row of {name}, which all arms are compared with; measure it too")


def gap(row: Row, other: Row, name: str) -> tuple[float, float, float]:
    """Return a mean difference, its standard error, and how large it must be to be told from 0."""
    own, others = ([float(one) for one in r[f"{name}_by_seed"].split()] for r in (row, other))
    mean, error = mean_and_error([a - b for a, b in zip(own, others, strict=True)])
    return mean, error, student(len(own) - 1) * error


def compared(row: Row, other: Row, name: str) -> str:
    """Say how an arm stands to another one; lower is better."""
    if row is other:
        return BASELINE
    mean, error, limit = gap(row, other, name)
    if not math.isfinite(mean):
        return "diverged with some seed"
    measured = f"({mean:+.3f} ± {error:.3f})"
    if abs(mean) <= limit:
        return f"within noise {measured}"
    return f"{'loses' if mean > 0 else 'wins'} {measured}"


def student(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t, with many degrees of freedom that of nine."""
    return STUDENT[min(freedom, len(STUDENT)) - 1]


def measured(row: Row, name: str, digits: int = 3) -> str:
    """Return `mean ± standard error`, empty if the arm has no such number."""
    if not row[name]:
        return ""
    return f"{float(row[name]):.{digits}f} ± {float(row[f'{name}_se']):.{digits}f}"
