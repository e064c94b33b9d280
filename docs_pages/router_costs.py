"""What each router costs in a training step, from benchmarks/results/routers.csv."""

import csv
from collections.abc import Iterator
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "benchmarks/results/routers.csv"


def section() -> Iterator[str]:
    """Yield the section with its table; quality is not in it where it was not measured."""
    with RESULTS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    places = sorted({f"{r['device']}, {r['threads']} threads, torch {r['torch']}" for r in rows})
    yield from ["## What they cost", ""]
    yield (
        "The embedded 135M model, 8 experts, one routing per block, by "
        "`python benchmarks/routers.py`. `step` is the time of a training step over that with "
        "`top_k`, `k=2`, in turns. Experts are those in use per token. "
        f" Measured on {'; '.join(places)}."
    )
    if not any(row["held_out_nll"] for row in rows):
        yield "Which router learns better is not in this table: nothing was trained for it."
    yield from ["", "| router | experts per token | step |", "| --- | --- | --- |"]
    for row in rows:
        yield f"| {row['router']} | {row['active_experts']} | x{row['step_ratio_to_top_k']} |"
