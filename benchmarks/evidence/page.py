"""Writes docs/evidence.md from the CSV files: `python -m benchmarks.evidence.page`."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence import arms
from benchmarks.evidence.compare import Row, baseline, compared, gap, measured, read

RESULTS, PAGE = Path("benchmarks/results"), Path("docs/evidence.md")

NAMES = {
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

PAIRS = (
    ("mixture_block", "uniform_router"),
    ("mixture_layer", "uniform_router"),
    ("mixture_threshold", "uniform_router"),
    ("mixture_top_p", "uniform_router"),
    ("mixture_block", "frozen_random_router"),
    ("mixture_block", "lora_active"),
    ("mixture_ffn", "lora_ffn_params"),
    ("oracle_routing", "mixture_block"),
)
"""Further comparisons on the real model: what learning to route adds, and equal parameters."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows)]


def where(row: Row) -> str:
    """Say on what a row was measured."""
    version = {name: row.get(f"{name}_version") or row[name] for name in ("torch", "peft")}
    version["transformers"] = row.get("transformers_version") or row["transformers"]
    versions = ", ".join(f"{name} {version[name]}" for name in ("torch", "transformers", "peft"))
    commit = f"commit {row['commit']}"
    return f"Measured on {row['device']}, {row['threads']} threads, {versions}, {commit}."


def worlds(rows: list[Row]) -> list[str]:
    """Return the section of the two worlds."""
    if not rows:
        return []
    lines = [
        "## Two worlds with a known optimum",
        "",
        f"`python -m benchmarks.evidence.two_worlds --seeds {rows[0]['seeds']} --steps "
        f"{rows[0]['steps']}`. Error over the mean square of the outputs, ± "
        f"standard error over {rows[0]['seeds']} seeds, each with a world of its own, "
        f"{rows[0]['steps']} steps of 256 samples; the learning rate is searched for every arm "
        "until the rates on both sides are worse.",
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
            [NAMES[r["arm"]], measured(r, "error"), r["parameters"], compared(r, best, "error")]
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
    present = {row["experiment_name"] for row in rows}
    asked = " --arms all" if present >= set(arms.ARMS) else ""
    limits = [gap(row, best, "test_nll")[2] for row in rows if row is not best]
    limits = sorted(limit for limit in limits if math.isfinite(limit)) or [0.0]
    quality = [
        [
            NAMES[row["experiment_name"]],
            measured(row, "test_nll"),
            compared(row, best, "test_nll"),
            *(measured(row, f"nll_{name}", 2) for name in names),
            row["learning_rate"],
        ]
        for row in rows
    ]
    return [
        "",
        "## SmolLM2-135M on unrelated tasks",
        "",
        f"`python -m benchmarks.evidence.smollm2 --seeds {first['seeds']}{asked}`. Held-out loss "
        f"of the answers in nats per token, ± standard error over {first['seeds']} seeds, "
        f"{first['steps']} steps of {first['batch']} rows: a reduced form, far from convergence. "
        "Lower is better; the model "
        f"without an adapter has {float(first['base_nll']):.3f}. Each seed has training rows, a "
        f"start and an order of its own, the same for every arm; the {first['test_rows']} test "
        "rows of each domain are the same for all, so that the errors say nothing of other test "
        f"rows. The learning rate is searched for every arm on {first['validation_rows']} other "
        f"rows of each domain, over the first {_searched(rows)} seeds, until the rates on both "
        "sides are worse. Differences below "
        f"{limits[0]:.2f} to {limits[-1]:.2f} nats, by arm, are not told from none here: effects "
        "of a few percent are out of sight. The domains' columns are not tested.",
        where(first),
        "",
        *table(["arm", "all", "against LoRA of equal total rank", *names, "rate"], quality),
        *pairs(rows),
        *costs(rows),
    ]


def _searched(rows: list[Row]) -> int:
    """Return over how many seeds rates were compared: those that were not chosen had no more."""
    tried = [(row["learning_rate"], each) for row in rows for each in row["rates_tried"].split()]
    others = [each for rate, each in tried if each.partition(":")[0] != rate]
    # Where no other rate was tried, there was nothing to compare.
    return max((int(each.rpartition("@")[2]) for each in others), default=int(rows[0]["seeds"]))


def pairs(rows: list[Row]) -> list[str]:
    """Return the comparisons of two arms of which neither is the baseline."""
    of = {row["experiment_name"]: row for row in rows}
    cells = [
        [NAMES[one], NAMES[other], compared(of[one], of[other], "test_nll")]
        for one, other in PAIRS
        if one in of and other in of
    ]
    if not cells:
        return []
    about = "What learning to route adds, and what equal parameters do:"
    return ["", about, "", *table(["arm", "against", "all domains"], cells)]


def costs(rows: list[Row]) -> list[str]:
    """Return the table of what each arm costs."""
    header = ["arm", "trainable", "active", "experts", "file", "step", "token", "memory"]
    cells = [
        [
            NAMES[row["experiment_name"]],
            f"{int(row['num_trainable_params']) / 1e6:.2f} M",
            f"{int(row['num_active_params']) / 1e6:.2f} M",
            f"{float(row['experts_per_token']):.1f}" if row["peft_type"] != "LORA" else "",
            f"{int(row['file_size']) / 1e6:.1f} MB",
            f"x{float(row['train_time_ratio']):.2f} ({float(row['train_time_ratio_low']):.2f} to "
            f"{float(row['train_time_ratio_high']):.2f})",
            f"{row['decode_tokens_per_second']}/s, x{float(row['decode_time_ratio']):.2f}",
            f"{int(row['accelerator_memory_max']) / 1e9:.2f} GB",
            measured(row, "forgetting"),
        ]
        for row in rows
    ]
    return [
        "",
        "What it costs: `active` are the trained parameters that a token uses, with so many "
        "`experts` as the trained router gave it on the test rows; the times of a training step "
        "(median, least and largest of the turns) and of a decoded token are ratios to the plain "
        "LoRA of equal total rank, all arms in turns on one thread; memory is what tensors made "
        "in a step hold at most, weights and optimizer left out; `forgetting` is the rise of the "
        f"loss of {rows[0]['texts']} plain English texts over the base model's "
        f"{float(rows[0]['base_text_nll']):.2f} nats per token.",
        "",
        *table([*header, "forgetting"], cells),
    ]


def sequence(rows: list[Row]) -> list[str]:
    """Return the section of one domain after the other."""
    if not rows:
        return []
    best = baseline(rows, "experiment_name", "lora_total")
    active = next((row for row in rows if row["experiment_name"] == "lora_active"), None)
    names = ["first_before", "first_after", "interference", "second_after", "forgetting"]
    cells = [
        [
            NAMES[row["experiment_name"]],
            *(measured(row, name) for name in names),
            compared(row, best, "first_before"),
            compared(row, best, "interference"),
            *([compared(row, active, "interference")] if active else []),
        ]
        for row in rows
    ]
    header = ["first, before", "first, after", "lost", "second, after", "forgetting"]
    against = ["first before, against LoRA of total rank", "lost, against it"]
    against += ["lost, against LoRA of active rank"] if active else []
    return [
        "",
        "## One domain after the other",
        "",
        f"Trained on `pronounce` for {int(rows[0]['steps']) // 2} steps, then on `math_word` for "
        "as many, with the rate found above: what the second does to the loss of the first, in "
        "nats per token, and what both do to that of plain English.",
        where(rows[0]),
        "",
        *table(["arm", *header, *against], cells),
    ]


def page(results: Path) -> str:
    """Return the page."""
    lines = [
        "# Does routing help? What was measured",
        "",
        "Losing cases are rows like the others. Written by `python -m benchmarks.evidence.page` "
        f"from the CSV files in `{results.as_posix()}`. Two arms are compared by the differences "
        "of their runs with one seed, with Student's paired t test at 5 %, not corrected for the "
        "number of comparisons: of twenty, one is wrong where nothing differs.",
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
