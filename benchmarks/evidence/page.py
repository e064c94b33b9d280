"""Writes docs/evidence.md from the CSV files: `python -m benchmarks.evidence.page`.

The last run of each arm counts, and all must be of one length and number of seeds. Which arm is
better is said by the numbers alone: a difference that Welch's t test does not tell from zero at 5 %
is called within noise.
"""

import argparse
import csv
import math
from collections.abc import Sequence
from pathlib import Path

RESULTS, PAGE = Path("benchmarks/results"), Path("docs/evidence.md")
Row = dict[str, str]

ARMS = {
    "lora_total": "plain LoRA, equal total rank",
    "lora_kr": "plain LoRA, equal total rank",
    "lora_active": "plain LoRA, equal active rank",
    "lora_ffn_params": "plain LoRA, the parameters of the FFN mixture",
    "lora_r": "plain LoRA, the rank of one expert",
    "lora_params": "plain LoRA, equal parameters",
    "mixture_block": "mixture, one routing per block",
    "mixture_layer": "mixture, a router per linear",
    "mixture_ffn": "mixture on the FFN",
    "mixture_shared_a": "mixture, shared A",
    "mixture_threshold": "mixture, threshold router",
    "mixture_top_p": "mixture, top-p router",
    "mixture_soft": "mixture, soft router",
    "mixture_k2": "mixture, top-2",
    "mixture_k1": "mixture, top-1",
    "frozen_random_router": "mixture, frozen random router",
    "uniform_router": "mixture, uniform weights",
    "oracle_routing": "mixture, routed by the true domain",
}


STUDENT = (
    math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179,
    2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip
"""97.5 % quantiles of Student's t for 0, 1, 2, ... degrees of freedom."""

_RUN = ("steps", "seeds")


def baseline(rows: Sequence[Row], key: str, name: str) -> Row:
    """Return the row of the plain LoRA that all are compared with."""
    for row in rows:
        if row[key] == name:
            return row
    raise SystemExit(f"there is no row of {name}, which all arms are compared with; measure it too")


def read(path: Path, keys: Sequence[str]) -> list[Row]:
    """Return the last row of each arm, in the order of the file; empty if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    last = list({tuple(row[key] for key in keys): row for row in rows}.values())
    runs = {tuple(row.get(key, "") for key in _RUN) for row in last}
    if len(runs) > 1:
        raise SystemExit(
            f"{path} mixes runs of different {' and '.join(_RUN)}: {sorted(runs)}; measure all "
            "arms in one way, and take the rows of the others out"
        )
    return last


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows)]


def measured(row: Row, name: str, digits: int = 3) -> str:
    """Return `mean ± standard error`."""
    return f"{float(row[name]):.{digits}f} ± {float(row[f'{name}_se']):.{digits}f}"


def compared(row: Row, other: Row, name: str) -> str:
    """Say how an arm stands to another one whose runs are others; see Welch 1947."""
    if row is other:
        return "the baseline"
    gap = float(row[name]) - float(other[name])
    errors = [float(each[f"{name}_se"]) for each in (row, other)]
    freedom = [int(each["seeds"]) - 1 for each in (row, other)]
    error = math.hypot(*errors)
    fourth = sum(e**4 / f for e, f in zip(errors, freedom, strict=True))
    limit = student(error**4 / fourth) if fourth else 0.0
    return verdict(gap, limit * error, f"{gap:+.3f}")


def paired(row: Row, baseline: Row) -> str:
    """Say how an arm stands to the baseline by the differences of runs with one seed."""
    if row is baseline:
        return "the baseline"
    gap, error = float(row["gap"]), float(row["gap_se"])
    limit = student(int(row["seeds"]) - 1) * error
    return verdict(gap, limit, f"{gap:+.3f} ± {error:.3f}")


def verdict(gap: float, limit: float, measured: str) -> str:
    """Say whether a difference of losses, lower being better, is beyond its limit."""
    if abs(gap) <= limit:
        return f"within noise ({measured})"
    return f"{'loses' if gap > 0 else 'wins'} ({measured})"


def student(freedom: float) -> float:
    """Return the 97.5 % quantile of Student's t, of the next lower whole number of freedom."""
    return STUDENT[min(int(freedom), len(STUDENT) - 1)]


def where(row: Row) -> str:
    """Say on what a row was measured."""
    return (
        f"Measured on {row['device']}, {row['threads']} threads, torch {row['torch']}, "
        f"transformers {row['transformers']}, peft {row['peft']}, commit {row['commit']}."
    )


def worlds(rows: list[Row]) -> list[str]:
    """Return the section of the two worlds."""
    if not rows:
        return []
    lines = [
        "## Two worlds with a known optimum",
        "",
        f"`python -m benchmarks.evidence.two_worlds --seeds {rows[0]['seeds']} --steps "
        f"{rows[0]['steps']}`. Error over the mean square of the outputs, ± "
        f"standard error over {rows[0]['seeds']} seeds, {rows[0]['steps']} steps of 256 samples; "
        "the learning rate is swept for every arm.",
        where(rows[0]),
    ]
    about = {
        "conflict": "Every domain maps the same inputs to other outputs, and a cue tells which: "
        "no static adapter of any rank gets below {}.",
        "separable": "Every domain has inputs of its own: one plain LoRA of the total rank is "
        "exact ({}), so that a mixture must not win.",
    }
    for kind, text in about.items():
        own = [row for row in rows if row["world"] == kind]
        if not own:
            continue
        best = baseline(own, "arm", "lora_kr")
        cells = [
            [ARMS[r["arm"]], measured(r, "error"), r["parameters"], compared(r, best, "error")]
            for r in own
        ]
        header = ["arm", "error", "parameters", "against LoRA of equal total rank"]
        bound = f"{float(own[0]['static_bound']):.3f}"
        lines += ["", f"### {kind}", "", text.format(bound), "", *table(header, cells)]
    return lines


def model(rows: list[Row]) -> list[str]:
    """Return the section of the real model."""
    if not rows:
        return []
    first = rows[0]
    names = [key[4:] for key in first if key.startswith("nll_") and not key.endswith("_se")]
    best = baseline(rows, "experiment_name", "lora_total")
    quality = [
        [
            ARMS[row["experiment_name"]],
            measured(row, "test_nll"),
            paired(row, best),
            *(measured(row, f"nll_{name}", 2) for name in names),
            row["learning_rate"],
        ]
        for row in rows
    ]
    return [
        "",
        "## SmolLM2-135M on unrelated tasks",
        "",
        "`python -m benchmarks.evidence.smollm2`. Held-out loss of the answers in nats per token, "
        f"± standard error over {first['seeds']} seeds, {first['steps']} steps of "
        f"{first['batch']} rows: a reduced form, far from convergence. Lower is better. The "
        "learning rate is searched for every arm on validation rows: with one seed until both "
        "neighbours are worse, then the better two with all seeds. The difference to the plain "
        "LoRA of equal total rank is that of runs on the same rows in the same order, tested by "
        "Student's paired t test at 5 %. The parameters of each arm stand in the second table.",
        where(first),
        "",
        *table(["arm", "all", "against LoRA of equal total rank", *names, "rate"], quality),
        *costs(rows),
    ]


def costs(rows: list[Row]) -> list[str]:
    """Return the table of what each arm costs."""
    header = ["arm", "trainable", "active", "experts", "file", "step", "token", "memory"]
    cells = [
        [
            ARMS[row["experiment_name"]],
            f"{int(row['num_trainable_params']) / 1e6:.2f} M",
            f"{int(row['num_active_params']) / 1e6:.2f} M",
            f"{float(row['experts_per_token']):.1f}" if row["peft_type"] != "LORA" else "",
            f"{int(row['file_size']) / 1e6:.1f} MB",
            f"x{float(row['train_time_ratio']):.2f}",
            f"x{float(row['decode_time_ratio']):.2f}",
            f"{int(row['accelerator_memory_max']) / 1e9:.2f} GB",
            f"{float(row['forgetting']):+.3f}" if row["forgetting"] else "",
        ]
        for row in rows
    ]
    return [
        "",
        "What it costs: `active` are the trained parameters that a token uses, with so many "
        "`experts` as the trained router gave it on the test rows; the times of a training step "
        "and of a decoded token are ratios to the plain LoRA of equal total rank, all arms in "
        "turns on one thread; memory is what tensors made in a step hold at most; `forgetting` is "
        "the rise of the loss of plain English over the base model, in nats per token.",
        "",
        *table([*header, "forgetting"], cells),
    ]


def sequence(rows: list[Row]) -> list[str]:
    """Return the section of one domain after the other."""
    if not rows:
        return []
    names = ["first_before", "first_after", "interference", "second_after"]
    cells = [
        [ARMS[row["experiment_name"]], *(measured(row, name) for name in names)] for row in rows
    ]
    return [
        "",
        "## One domain after the other",
        "",
        "Trained on `pronounce`, then on `math_word`, with the rate found above: what the second "
        "does to the loss of the first, in nats per token.",
        where(rows[0]),
        "",
        *table(["arm", "first, before", "first, after", "lost", "second, after"], cells),
    ]


def page(results: Path) -> str:
    """Return the page."""
    lines = [
        "# Does routing help? What was measured",
        "",
        "Losing cases are rows like the others. Written by `make evidence-page` from the CSV files "
        "in `benchmarks/results`. Each arm is compared with the plain LoRA of equal total rank by "
        "a t test over the seeds, Welch's where nothing else is said, at 5 % each and not "
        "corrected for their number: of twenty such comparisons one is wrong where nothing "
        "differs.",
        "",
        *worlds(read(results / "two_worlds.csv", ("world", "arm"))),
        *model(read(results / "smollm2.csv", ("experiment_name",))),
        *sequence(read(results / "smollm2_sequential.csv", ("experiment_name",))),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(prog="page", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--out", type=Path, default=PAGE, help="the page")
    args = parser.parse_args(arguments)
    args.out.write_text(page(args.results))
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
