"""Active experts, step time and quality of every router on the embedded model and tasks.

    OMP_NUM_THREADS=2 python benchmarks/routers.py --steps 12 --csv benchmarks/results/routers.csv

Each arm is the same mixture with another router. Those whose number of experts varies, and `top_k`
beside them, are trained for the same steps on the same rows and measured on held-out rows: nats
per answer token, and experts in use per real token. The others use a fixed number and are measured
untrained. Step times are taken in turns with `top_k`, on fresh copies, so that a noisy machine
hurts both alike; the ratio is the median over rounds. One seed and few steps: a table to see costs
by, not to choose a winner.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from common import append_csv, device_name
from peft import get_peft_model
from transformers import AutoTokenizer
from transformers.utils import logging

import moeadapt
from moeadapt import stats
from moeadapt.demo.arms import BATCH, Arm, batch_of, load_base, time_step, train_arm
from moeadapt.demo.heldout import Mean, answer_nll
from moeadapt.demo.run import BASE
from moeadapt.embedded import TASKS, load_task, mix, resolve_model

SETTINGS: dict[str, dict[str, Any]] = {
    "top_k k=1": {"router": {"name": "top_k", "k": 1}},
    "top_k k=2": {"router": {"name": "top_k", "k": 2}},
    "top_k k=4": {"router": {"name": "top_k", "k": 4}},
    "switch": {"router": "switch"},
    "sigmoid + loss_free": {"router": "sigmoid", "balance": {"loss_free": {}}},
    "cosine": {"router": "cosine"},
    "hierarchical": {"router": {"name": "hierarchical", "k_groups": 2}},
    "soft": {"router": "soft"},
    "gumbel": {"router": "gumbel"},
    "random": {"router": "random", "balance": None},
    "hash": {"router": {"name": "hash", "k": 2}, "balance": None},
    "uniform": {"router": "uniform", "balance": None},
    "expert_choice": {"router": "expert_choice", "balance": None},
    "rank_wise k=16": {"router": {"name": "rank_wise", "k": 16}, "experts": "rank1"},
    "null experts 4": {"router": {"name": "top_k", "k": 4, "null_experts": 8}},
    "top_p p=0.2": {"router": {"name": "top_p", "p": 0.2}},
    "top_p p=0.4": {"router": {"name": "top_p", "p": 0.4}},
    "top_p p=0.7": {"router": {"name": "top_p", "p": 0.7}},
    "threshold 1/E": {"router": "threshold"},
    "threshold learned": {"router": {"name": "threshold", "learned": True}},
    "sparsegen 0.2": {"router": {"name": "sparsegen", "spread": 0.2}},
    "sparsegen 1": {"router": {"name": "sparsegen", "spread": 1.0}},
    "dynamic": {"router": "dynamic"},
    "relu": {"router": "relu", "balance": {"l1_sparsity": {"target": 0.25}}},
    "top_k k=2 per sequence": {"router": {"name": "top_k", "k": 2, "per": "sequence"}},
}


ADAPTIVE = ("top_k", "null", "top_p", "threshold", "sparsegen", "dynamic", "relu")
"""Starts of the names of the arms that are trained."""


def parse_args() -> argparse.Namespace:
    """Read the sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12, help="training steps; 0: none")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps per arm; 0: none")
    parser.add_argument("--test-rows", type=int, default=16, help="held-out rows per task")
    parser.add_argument("--time-rows", type=int, default=2, help="rows of a timed step")
    parser.add_argument("--only", nargs="*", help="arms to run, all if left out")
    parser.add_argument("--csv", type=Path)
    return parser.parse_args()


def make_arm(name: str) -> Arm:
    """Return the mixture with one router: 8 experts of rank 8, one routing per block."""
    config = moeadapt.MoeLoraConfig(
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        r=8,
        lora_alpha=16,
        num_experts=8,
        router_scope="block",
        **SETTINGS[name],
    )
    return Arm(name=name, folder=name.replace(" ", "_").replace("/", "_"), config=config)


def train(name: str, base_path: str, tokenizer: Any, rows: Any, steps: int) -> Any:
    """Train one arm on the demo's data, with its optimizer and schedule."""
    return train_arm(
        make_arm(name),
        base_path,
        tokenizer,
        rows,
        steps=steps,
        out=Path("outputs/routers"),
        on_step=lambda step, loss: None,
    )


def active_experts(model: Any, batch: dict[str, torch.Tensor]) -> float:
    """Mean experts in use per real token, over all routers."""
    model.eval()
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with moeadapt.collect_routing(model) as routings, torch.no_grad():
        model(**inputs)
    means = [
        float(stats.token_mean(stats.active(routing), routing))
        for collected in routings.values()
        for routing in collected
    ]
    return statistics.fmean(means)


def step_times(
    names: list[str], base_path: str, batch: dict[str, torch.Tensor], rounds: int
) -> dict[str, float]:
    """Return each arm's step time as a ratio to `top_k k=2`, the median over rounds."""
    first = "top_k k=2"
    ratios = {}
    reference = get_peft_model(load_base(base_path), make_arm(first).config)
    for name in names:
        model = get_peft_model(load_base(base_path), make_arm(name).config)
        for warm in (reference, model):
            time_step(warm, batch)
        turns = [(time_step(model, batch), time_step(reference, batch)) for _ in range(rounds)]
        ratios[name] = statistics.median(mine / theirs for mine, theirs in turns)
    return ratios


def main() -> None:
    """Train, measure, print, and write the CSV."""
    args = parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    base_path = resolve_model(BASE)
    tokenizer = AutoTokenizer.from_pretrained(base_path)
    rows = mix(TASKS, train=-(-args.steps * BATCH // len(TASKS)))
    held_out = [load_task(task, train=0, test=args.test_rows).test for task in TASKS]
    test = [row for rows_of_task in held_out for row in rows_of_task]
    batch = batch_of(tokenizer, test[:: max(len(test) // BATCH, 1)][:BATCH], torch.device("cpu"))
    names = args.only or list(SETTINGS)
    results: dict[str, tuple[float, Mean | None]] = {}
    for name in names:
        nll = None
        if args.steps and name.startswith(ADAPTIVE):
            model = train(name, base_path, tokenizer, rows, args.steps)
            nll = Mean.of(answer_nll(model, tokenizer, test))
        else:
            model = get_peft_model(load_base(base_path), make_arm(name).config)
        results[name] = (active_experts(model, batch), nll)
        print(f"{name:24s} active {results[name][0]:5.2f}  held-out {nll}", flush=True)
    few = batch_of(tokenizer, test[: args.time_rows], torch.device("cpu"))
    times = step_times(names, base_path, few, args.rounds) if args.rounds else {}
    table = [
        {
            "router": name,
            "active_experts": round(active, 2),
            "held_out_nll": "" if nll is None else round(nll.value, 4),
            "standard_error": "" if nll is None else round(nll.error, 4),
            "step_ratio_to_top_k": round(times[name], 2) if times else "",
            "steps": 0 if nll is None else args.steps,
            "device": device_name("cpu"),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "moeadapt": moeadapt.__version__,
        }
        for name, (active, nll) in results.items()
    ]
    for row in table:
        print(row)
    if args.csv:
        append_csv(args.csv, table)


if __name__ == "__main__":
    main()
