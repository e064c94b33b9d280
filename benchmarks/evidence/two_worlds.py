"""Adapters in two worlds with a known optimum: `python -m benchmarks.evidence.two_worlds`.

Every arm adapts the same frozen linear map, through PEFT. The learning rate of each arm is searched
on validation data, see `sweep.py`; the errors are over seeds, each with a world of its own.

Letters: K domains, r rank of one domain's map.
"""

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import moeadapt
from benchmarks.common import append_csv, where
from benchmarks.evidence.rows import of_rates, of_seeds
from benchmarks.evidence.sweep import choose_rate
from benchmarks.evidence.worlds import D, K, Kind, O, World, r
from moeadapt import MoeLoraConfig

CSV = Path("benchmarks/results/two_worlds.csv")
BATCH, HELD_OUT = 256, 4000
VALIDATION, TEST = 1, 2
"""Seeds of the held-out samples; training uses those from 3 on."""

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)

PLAIN = {"lora_kr": K * r, "lora_r": r, "lora_params": K * r + K * D // (D + O)}
"""Equal total rank first, equal active rank, and as many parameters as a mixture has."""
MIXTURES: dict[str, dict[str, Any]] = {
    "mixture_soft": {"router": "soft"},
    "mixture_k2": {"router": {"name": "top_k", "k": 2}},
    "mixture_k1": {"router": {"name": "top_k", "k": 1, "normalize": "none"}},
    "frozen_random_router": {"router": {"name": "top_k", "k": 2, "freeze": True, "init_std": 1.0}},
    "uniform_router": {"router": "uniform"},
    "oracle_routing": {"router": "soft"},
}
ARMS = (*PLAIN, *MIXTURES)


class Base(nn.Module):
    """One frozen linear map of zeros: everything has to be learned by the adapter."""

    def __init__(self) -> None:
        """Make the map."""
        super().__init__()
        self.map = nn.Linear(D, O, bias=False)
        nn.init.zeros_(self.map.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        return self.map(x)


def make(arm: str) -> nn.Module:
    """Return the base with the adapter of an arm."""
    common: dict[str, Any] = {"target_modules": ["map"]}
    if arm in PLAIN:
        rank = PLAIN[arm]
        return get_peft_model(Base(), LoraConfig(r=rank, lora_alpha=rank, **common))
    fields = {"r": r, "lora_alpha": r, "num_experts": K, "balance": None, **MIXTURES[arm]}
    return get_peft_model(Base(), MoeLoraConfig(**fields, **common))


def routed(model: nn.Module, arm: str, domains: Tensor) -> Any:
    """Return a context in which `oracle_routing` sends each sample to its domain's expert."""
    if arm != "oracle_routing":
        return nullcontext()
    return moeadapt.override_routing(model, edit=lambda *_: F.one_hot(domains, K).float())


def error(model: nn.Module, arm: str, world: World, seed: int) -> float:
    """Return the mean squared error over the outputs' mean square."""
    x, y, domains = world.sample(HELD_OUT, seed)
    with torch.no_grad(), routed(model.eval(), arm, domains):
        return float((model(x) - y).square().sum() / y.square().sum())


@dataclass(frozen=True, kw_only=True)
class Run:
    """Errors of one trained adapter on held-out data.

    Attributes:
        rate: learning rate.
        validation: error that the rate is chosen by.
        test: error that is reported.
    """

    rate: float
    validation: float
    test: float


def train(arm: str, world: World, rate: float, steps: int) -> Run:
    """Train one adapter."""
    torch.manual_seed(world.seed)
    model = make(arm).train()
    if arm in MIXTURES:
        moeadapt.set_aux_loss_scale(model, 1.0)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        x, y, domains = world.sample(BATCH, TEST + 1 + step)
        with routed(model, arm, domains):
            loss = (model(x) - y).square().sum(-1).mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    validation, test = (error(model, arm, world, seed) for seed in (VALIDATION, TEST))
    return Run(rate=rate, validation=validation, test=test)


def measure(kind: Kind, arm: str, rates: Sequence[float], seeds: int, steps: int) -> dict[str, Any]:
    """Return the row of one arm in one world, at the rate of the lowest mean validation error."""
    start = time.perf_counter()
    worlds = [World.draw(kind, seed) for seed in range(seeds)]
    found, tried = choose_rate(
        lambda rate, seed: train(arm, worlds[seed], rate, steps), sorted(rates), seeds
    )
    return {
        "world": kind,
        "arm": arm,
        **of_seeds("error", [run.test for run in found]),
        "static_bound": round(statistics.mean(world.bound for world in worlds), 4),
        "learning_rate": found[0].rate,
        "rates_tried": of_rates(tried),
        "seeds": seeds,
        "parameters": sum(p.numel() for p in make(arm).parameters() if p.requires_grad),
        "seconds": round(time.perf_counter() - start, 1),
    }


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Print a table per world."""
    for kind in dict.fromkeys(row["world"] for row in rows):
        own = [row for row in rows if row["world"] == kind]
        title = f"{kind}: no linear map gets below {own[0]['static_bound']:.3f}"
        table = Table(title=title, title_justify="left")
        for column in ("arm", "error / mean square", "parameters", "learning rate"):
            table.add_column(column, justify="left" if column == "arm" else "right")
        for row in own:
            found = f"{row['error']:.3f} ± {row['error_se']:.3f}"
            table.add_row(row["arm"], found, str(row["parameters"]), str(row["learning_rate"]))
        console.print(table)


def main(arguments: list[str] | None = None, progress: Callable[[str], None] | None = None) -> int:
    """Run every arm in both worlds."""
    parser = argparse.ArgumentParser(prog="two_worlds", description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--csv", type=Path, default=CSV)
    parser.add_argument("--no-csv", action="store_true")
    args = parser.parse_args(arguments)
    if args.seeds < 2 or args.steps < 1:
        parser.error("--seeds must be at least 2, for an error, and --steps at least 1")
    torch.set_num_threads(1)
    say = progress or (lambda text: print(text, file=sys.stderr, flush=True))
    warnings.filterwarnings("ignore", ".*k=1.*", UserWarning)
    rows = []
    for kind in get_args(Kind):
        for arm in args.arms:
            say(f"{kind}: {arm}")
            rows.append(measure(kind, arm, args.rates, args.seeds, args.steps))
    place = where("cpu")
    print("  ".join(f"{name}: {value}" for name, value in place.items()))
    show(rows, Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120))
    if not args.no_csv:
        append_csv(args.csv, [{**row, "steps": args.steps, **place} for row in rows])
        print(f"{len(rows)} rows appended to {args.csv}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
