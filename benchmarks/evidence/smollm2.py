"""Mixtures and plain LoRAs on a real model: `python -m benchmarks.evidence.smollm2`.

Every arm sees the same rows in the same order. The learning rate is searched for each arm on
validation rows, see `sweep.py`; every seed has training rows, a start and an order of its own, and
all have the same test rows. `--full` is for a GPU.
"""

import argparse
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import moeadapt
from benchmarks.common import append_csv, check_columns, where
from benchmarks.evidence import cost, domains, rows, runs, sequential
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
        searched: those of them that choose the rate, the first.
        steps: of training, and half as many for each part of the sequence.
        batch: rows of a step.
        train: rows of each domain.
        validation: held-out rows of each domain, for the choice of the rate.
        test: further held-out rows of each domain.
        texts: of base text.
        longest: characters of prompt and answer together.
    """

    arms: tuple[str, ...]
    rates: tuple[float, ...]
    seeds: int
    searched: int
    steps: int
    batch: int
    train: int
    validation: int
    test: int
    texts: int
    longest: int


SMALL = Preset(
    arms=REDUCED, rates=(5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2), seeds=5, searched=3, steps=12,
    batch=4, train=40, validation=6, test=16, texts=3, longest=210,
)  # fmt: skip
FULL = Preset(
    arms=tuple(ARMS), rates=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2), seeds=5, searched=3, steps=600,
    batch=32, train=8000, validation=100, test=200, texts=60, longest=1000,
)  # fmt: skip
SEQUENTIAL = (
    "lora_total", "lora_active", "mixture_block", "mixture_ffn", "frozen_random_router",
)  # fmt: skip
"""The arms that are trained on one domain after the other."""

TOY = Preset(
    arms=("lora_total", "oracle_routing"), rates=(1e-3,), seeds=2, searched=1, steps=2, batch=2,
    train=4, validation=2, test=2, texts=1, longest=240,
)  # fmt: skip


class Bench:
    """One base model, its rows, and the runs on them."""

    def __init__(self, preset: Preset, device: str, path: str | None = None) -> None:
        """Load tokenizer and rows; `path`: a base, the built-in model if left out."""
        self.preset, self.device, self.sizes = preset, device, Sizes()
        self.name = path or BASE
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
        return domains.load(
            self.names,
            train=preset.train,
            validation=preset.validation,
            test=preset.test,
            longest=preset.longest,
            seed=seed,
        )

    @property
    def setting(self) -> rows.Setting:
        """What is written beside each row."""
        return rows.Setting(
            model_id=self.name,
            base_nll=round(statistics.mean(self.base_losses.values()), 4),
            base_text_nll=round(self.base_loss, 4),
            steps=self.preset.steps,
            batch=self.preset.batch,
            train_rows=self.preset.train,
            validation_rows=self.preset.validation,
            test_rows=self.preset.test,
            texts=self.preset.texts,
        )

    def load(self) -> Any:
        """Return a fresh base in float32."""
        model: Any = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32)
        return model.to(self.device)

    def run(self, arm: str, rate: float, seed: int) -> runs.Run:
        """Train once and score on the validation rows."""
        train, validation, _ = self.rows[seed]
        model = runs.start(arm, self.load, self.sizes, seed)
        begin = time.perf_counter()
        curve = runs.fit(
            model, arm, self.tokenizer, train, self.names, self.sizes,
            rate=rate, steps=self.preset.steps, batch=self.preset.batch, seed=seed,
        )  # fmt: skip
        seconds = time.perf_counter() - begin
        losses = runs.score(model, arm, self.tokenizer, validation, self.names, self.sizes)
        return runs.Run(
            arm=arm,
            rate=rate,
            seed=seed,
            validation=statistics.mean(losses.values()),
            curve=curve,
            seconds=seconds,
            model=model,
        )

    def test(self, run: runs.Run) -> runs.Run:
        """Score a run on the test rows and on base text, and let go of its model."""
        scored = partial(runs.score, run.model, run.arm, self.tokenizer)
        lora = run.arm.startswith("lora")
        with nullcontext({}) if lora else moeadapt.collect_routing(run.model) as routings:
            losses = scored(self.rows[run.seed][2], self.names, self.sizes)
        experts = runs.experts_in_use(one for each in routings.values() for one in each)
        forgetting = None
        if run.arm != "oracle_routing":
            loss = runs.base_text_loss(run.model, self.tokenizer, self.texts)
            forgetting = loss - self.base_loss
        return replace(run, model=None, losses=losses, experts=experts, forgetting=forgetting)

    def measure(self, arm: str) -> tuple[list[runs.Run], dict[float, list[float]]]:
        """Return a run for each seed, and the validation losses of every rate tried."""
        preset = self.preset
        run = partial(self.run, arm)
        found, tried = choose_rate(run, preset.rates, preset.seeds, preset.searched)
        return [self.test(run) for run in found], tried

    def sequence(self, arm: str, rate: float) -> list[sequential.Sequence2]:
        """Train on the first domain, then on the second, with each seed."""
        how: dict[str, Any] = {"rate": rate, "batch": self.preset.batch}
        how["steps"] = max(self.preset.steps // 2, 1)
        names = (self.names[0], self.names[1])
        found = []
        for seed, (train, _, test) in self.rows.items():
            data = (train, test)
            what: Any = (arm, self.load, self.tokenizer, data, names, self.texts, self.sizes)
            found.append(sequential.run(*what, **how, seed=seed))
        return found


def columns(names: list[str], place: dict[str, Any]) -> dict[str, list[str]]:
    """Return the columns of each file, before anything is measured."""
    none = runs.Run(
        arm=cost.BASELINE, rate=0.0, seed=0, validation=0.0, curve=[0.0], seconds=0.0, model=None,
        losses=dict.fromkeys(names, 0.0),
    )  # fmt: skip
    zero = cost.Cost(**dict.fromkeys((field.name for field in fields(cost.Cost)), 0))
    nothing: Any = dict.fromkeys((field.name for field in fields(rows.Setting)), 0)
    setting = rows.Setting(**nothing)
    after: Any = dict.fromkeys((field.name for field in fields(sequential.Sequence2)), 0)
    both = [sequential.Sequence2(**after)] * 2
    return {
        "smollm2.csv": [*rows.of_arm([none, none], {}, zero, setting, 0.0), *place],
        "smollm2_sequential.csv": [*rows.of_sequence(both, setting), *place],
    }


def place_of(device: str) -> dict[str, Any]:
    """Return the columns that say where, when and with what a row was measured."""
    found = where(device)
    versions = {f"{name}_version": found.pop(name) for name in ("torch", "transformers", "peft")}
    return {**found, **versions, "created_at": datetime.now(UTC).isoformat(timespec="seconds")}


def main(arguments: list[str] | None = None) -> int:
    """Run every arm and append its rows."""
    parser = argparse.ArgumentParser(prog="smollm2", description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="for a GPU")
    size.add_argument("--toy", action="store_true", help="to see that it works")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--base", help=f"a folder, {BASE} if left out")
    parser.add_argument(
        "--arms", nargs="+", choices=[*ARMS, "all"],
        help=f"{cost.BASELINE} is always measured too; {' '.join(REDUCED)} if left out",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, help="of training, instead of the preset's")
    parser.add_argument("--seeds", type=int, help="of each arm, instead of the preset's")
    parser.add_argument("--no-sequence", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.toy and args.results == RESULTS:
        parser.error("--toy measures nothing: name a folder of its own with --results")
    preset = FULL if args.full else TOY if args.toy else SMALL
    asked_for = {name: getattr(args, name) for name in ("steps", "seeds")}
    preset = replace(preset, **{k: v for k, v in asked_for.items() if v is not None})
    if preset.steps < 1 or preset.seeds < 2:
        parser.error("--seeds must be at least 2, for an error, and --steps at least 1")
    begin, place = time.perf_counter(), place_of(args.device)
    for name, names in columns(domains.available(), place).items():
        check_columns(args.results / name, names)
    bench = Bench(preset, args.device, args.base)
    base = " ".join(f"{name} {loss:.3f}" for name, loss in bench.base_losses.items())
    print(f"base model: {base}; base text {bench.base_loss:.3f}", flush=True)
    asked = list(ARMS) if "all" in (args.arms or ()) else args.arms or preset.arms
    arms = list(dict.fromkeys([cost.BASELINE, *asked]))
    batch = bench.rows[0][0][: preset.batch]
    costs = cost.measure(arms, bench.load, bench.tokenizer, batch, bench.sizes)
    for arm in arms:
        since = time.perf_counter()
        found, tried = bench.measure(arm)
        taken = time.perf_counter() - since
        row = rows.of_arm(found, tried, costs[arm], bench.setting, taken)
        append_csv(args.results / "smollm2.csv", [{**row, **place}])
        text = f"{arm}: {row['test_nll']:.3f} ± {row['test_nll_se']:.3f} at {row['learning_rate']}"
        if not args.no_sequence and arm in SEQUENTIAL:
            after = rows.of_sequence(bench.sequence(arm, found[0].rate), bench.setting)
            append_csv(args.results / "smollm2_sequential.csv", [{**after, **place}])
            text += f"; interference {after['interference']:.3f} ± {after['interference_se']:.3f}"
        print(f"{text} ({time.perf_counter() - begin:.0f} s)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
