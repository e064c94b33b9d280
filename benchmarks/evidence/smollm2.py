"""Mixtures and plain LoRAs on a real model: `python -m benchmarks.evidence.smollm2`.

Every arm sees the same rows in the same order. The learning rate is searched for each arm on
validation rows, see `sweep.py`; errors are over seeds, and those of the difference to the plain
LoRA of equal total rank over pairs of runs with one seed. `--full` is for a GPU.
"""

import argparse
import math
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import moeadapt
from benchmarks.common import append_csv, check_columns, where
from benchmarks.evidence import cost, domains, runs, sequential
from benchmarks.evidence.arms import ARMS, REDUCED, Sizes
from benchmarks.evidence.base_text import base_text
from benchmarks.evidence.sweep import choose_rate
from moeadapt.embedded import resolve_model

BASE = "embedded:smollm2-135m"
RESULTS = Path("benchmarks/results")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """How much is done.

    Attributes:
        arms: names.
        rates: learning rates to climb on, in rising order.
        seeds: runs of each arm at its rate.
        steps: of training, and half as many for each part of the sequence.
        batch: rows of a step.
        train: rows of each domain.
        test: rows of each domain, and as many for validation.
        texts: of base text.
        longest: characters of prompt and answer together.
    """

    arms: tuple[str, ...]
    rates: tuple[float, ...]
    seeds: int
    steps: int
    batch: int
    train: int
    test: int
    texts: int
    longest: int


SMALL = Preset(
    arms=REDUCED, rates=(5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2), seeds=3, steps=12, batch=4,
    train=40, test=6, texts=3, longest=210,
)  # fmt: skip
FULL = Preset(
    arms=tuple(ARMS), rates=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2), seeds=3, steps=600, batch=32,
    train=8000, test=200, texts=60, longest=1000,
)  # fmt: skip
SEQUENTIAL = (
    "lora_total", "lora_active", "mixture_block", "mixture_ffn", "frozen_random_router",
)  # fmt: skip
"""The arms that are trained on one domain after the other."""

TOY = Preset(
    arms=("lora_total", "oracle_routing"), rates=(1e-3,), seeds=2, steps=2, batch=2, train=4,
    test=2, texts=1, longest=240,
)  # fmt: skip


class Bench:
    """One base model, its rows, and the runs on them."""

    def __init__(self, preset: Preset, device: str, path: str | None = None) -> None:
        """Load tokenizer and rows; `path`: a base, the built-in model if left out."""
        self.preset, self.device, self.sizes = preset, device, Sizes()
        self.path = path or resolve_model(BASE)
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        self.names = domains.available()
        self.texts = base_text(preset.texts)
        self.rows = {seed: self._rows(seed) for seed in range(preset.seeds)}
        with torch.no_grad():
            base = self.load().eval()
            self.base_loss = runs.base_text_loss(base, self.tokenizer, self.texts)
            scored = partial(runs.score, base, "lora_total", self.tokenizer)
            self.base_losses = scored(self.rows[0][2], self.names, self.sizes)

    def _rows(self, seed: int) -> tuple[list[Any], list[Any], list[Any]]:
        preset = self.preset
        sizes = {"train": preset.train, "test": preset.test, "longest": preset.longest}
        return domains.load(self.names, **sizes, seed=seed)

    def load(self) -> Any:
        """Return a fresh base in float32."""
        model = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32)
        return model.to(self.device)

    def run(self, arm: str, rate: float, seed: int) -> runs.Run:
        """Train once and score on the validation rows."""
        train, validation, _ = self.rows[seed]
        model = runs.start(arm, self.load, self.sizes, seed)
        curve = runs.fit(
            model, arm, self.tokenizer, train, self.names, self.sizes,
            rate=rate, steps=self.preset.steps, batch=self.preset.batch, seed=seed,
        )  # fmt: skip
        losses = runs.score(model, arm, self.tokenizer, validation, self.names, self.sizes)
        return runs.Run(
            arm=arm,
            rate=rate,
            seed=seed,
            validation=statistics.mean(losses.values()),
            curve=curve,
            model=model,
        )

    def test(self, run: runs.Run) -> runs.Run:
        """Score a run on the test rows and on base text, and let go of its model."""
        scored = partial(runs.score, run.model, run.arm, self.tokenizer)
        lora = run.arm.startswith("lora")
        with nullcontext({}) if lora else moeadapt.collect_routing(run.model) as routings:
            losses = scored(self.rows[run.seed][2], self.names, self.sizes)
        experts = runs.experts_in_use(one for each in routings.values() for one in each)
        forgetting = math.nan
        if run.arm != "oracle_routing":
            loss = runs.base_text_loss(run.model, self.tokenizer, self.texts)
            forgetting = loss - self.base_loss
        return replace(run, model=None, losses=losses, experts=experts, forgetting=forgetting)

    def measure(self, arm: str) -> tuple[list[runs.Run], dict[float, list[float]]]:
        """Return a run for each seed, and the validation losses of every rate tried."""
        found, tried = choose_rate(partial(self.run, arm), self.preset.rates, self.preset.seeds)
        return [self.test(run) for run in found], tried

    def sequence(self, arm: str, rate: float) -> list[sequential.Sequence2]:
        """Train on the first domain, then on the second, with each seed."""
        how: dict[str, Any] = {"rate": rate, "batch": self.preset.batch}
        how["steps"] = max(self.preset.steps // 2, 1)
        names = (self.names[0], self.names[1])
        found = []
        for seed, (train, _, test) in self.rows.items():
            data = (train, test)
            job = partial(sequential.run, arm, self.load, self.tokenizer, data, names, self.sizes)
            found.append(job(**how, seed=seed))
        return found


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Return the mean and its standard error."""
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5


def row_of(
    found: list[runs.Run],
    baseline: list[runs.Run],
    tried: dict[float, list[float]],
    preset: Preset,
    costs: cost.Cost,
) -> dict[str, Any]:
    """Return one arm in the columns of PEFT's method comparison, and ours behind them."""
    test, error = mean_and_error([run.test for run in found])
    pairs = zip(found, baseline, strict=True)
    gap, gap_error = mean_and_error([own.test - other.test for own, other in pairs])
    experts = statistics.mean(run.experts for run in found)
    forgotten = [run.forgetting for run in found if run.forgetting == run.forgetting]
    one = found[0]
    row: dict[str, Any] = {
        "task_name": "moeadapt-domains",
        "experiment_name": one.arm,
        "peft_type": "LORA" if one.arm.startswith("lora") else "MOEADAPT",
        "test_nll": round(test, 4),
        "test_nll_se": round(error, 4),
        "gap": round(gap, 4),
        "gap_se": round(gap_error, 4),
        "num_trainable_params": costs.parameters,
        "num_active_params": round(costs.active_parameters(experts)),
        "experts_per_token": round(experts, 2),
        "accelerator_memory_max": costs.peak_memory,
        "train_time_per_step": round(costs.step_seconds, 3),
        "train_time_ratio": round(costs.step_ratio, 3),
        "file_size": costs.file_size,
        "forgetting": round(statistics.mean(forgotten), 4) if forgotten else "",
        "decode_tokens_per_second": round(costs.generated, 1),
        "decode_time_ratio": round(costs.decode_ratio, 3),
        "learning_rate": one.rate,
        "rates_tried": " ".join(
            f"{rate}:{statistics.fmean(tried[rate]):.3f}@{len(tried[rate])}"
            for rate in sorted(tried)
        ),
        "seeds": len(found),
        "steps": preset.steps,
        "batch": preset.batch,
    }
    for name in one.losses:
        middle, spread = mean_and_error([run.losses[name] for run in found])
        row[f"nll_{name}"], row[f"nll_{name}_se"] = round(middle, 4), round(spread, 4)
    return row


def columns(names: list[str], place: dict[str, Any]) -> list[str]:
    """Return the columns of the table of arms, before anything is measured."""
    none = runs.Run(
        arm=cost.BASELINE, rate=0.0, seed=0, validation=0.0, curve=[], model=None,
        losses=dict.fromkeys(names, 0.0),
    )  # fmt: skip
    zero = cost.Cost(**dict.fromkeys((field.name for field in fields(cost.Cost)), 0))
    return [*row_of([none, none], [none, none], {}, SMALL, zero), *place]


def sequence_row(found: list[sequential.Sequence2]) -> dict[str, Any]:
    """Return one arm of the sequential training."""
    row: dict[str, Any] = {"experiment_name": found[0].arm, "seeds": len(found)}
    for name in ("first_before", "first_after", "second_after", "interference"):
        middle, spread = mean_and_error([getattr(one, name) for one in found])
        row[name], row[f"{name}_se"] = round(middle, 4), round(spread, 4)
    return row


def main(arguments: list[str] | None = None) -> int:
    """Run every arm and append its rows."""
    parser = argparse.ArgumentParser(prog="smollm2", description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="for a GPU")
    size.add_argument("--toy", action="store_true", help="to see that it works")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--base", help=f"a folder, {BASE} if left out")
    parser.add_argument(
        "--arms", nargs="+", choices=list(ARMS), help=f"{cost.BASELINE} is always measured too"
    )
    parser.add_argument("--steps", type=int, help="of training, instead of the preset's")
    parser.add_argument("--no-sequence", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.toy and args.results == RESULTS:
        parser.error("--toy measures nothing: name a folder of its own with --results")
    preset = FULL if args.full else TOY if args.toy else SMALL
    if args.steps:
        preset = replace(preset, steps=args.steps)
    begin, place = time.perf_counter(), where(args.device)
    check_columns(args.results / "smollm2.csv", columns(domains.available(), place))
    bench = Bench(preset, args.device, args.base)
    base = " ".join(f"{name} {loss:.3f}" for name, loss in bench.base_losses.items())
    print(f"base model: {base}; base text {bench.base_loss:.3f}", flush=True)
    arms = list(dict.fromkeys([cost.BASELINE, *(args.arms or preset.arms)]))
    batch = bench.rows[0][0][: preset.batch]
    costs = cost.measure(arms, bench.load, bench.tokenizer, batch, bench.sizes)
    baseline: list[runs.Run] = []
    for arm in arms:
        found, tried = bench.measure(arm)
        baseline = baseline or found
        row = row_of(found, baseline, tried, preset, costs[arm])
        append_csv(args.results / "smollm2.csv", [{**row, **place}])
        text = f"{arm}: {row['test_nll']:.3f} ± {row['test_nll_se']:.3f} at {row['learning_rate']}"
        if not args.no_sequence and arm in SEQUENTIAL:
            after = sequence_row(bench.sequence(arm, found[0].rate))
            append_csv(args.results / "smollm2_sequential.csv", [{**after, **place}])
            text += f"; interference {after['interference']:.3f} ± {after['interference_se']:.3f}"
        print(f"{text} ({time.perf_counter() - begin:.0f} s)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
