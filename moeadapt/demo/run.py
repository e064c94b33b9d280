"""Runs the demo: train, compare, save, load in a new process, generate, report, export."""

import ctypes
import json
import logging
import os
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors.torch import save_file
from transformers import AutoTokenizer

from moeadapt.demo.arms import (
    BATCH,
    Arm,
    batch_of,
    load_base,
    make_arms,
    seconds_per_step,
    time_step,
    train_arm,
)
from moeadapt.demo.heldout import Mean, answer_nll, by_domain, verdict
from moeadapt.demo.reload import PROBE
from moeadapt.demo.routing import write_report
from moeadapt.demo.stock import TARGET, export_stock, make_room
from moeadapt.embedded import TASKS, load_task, mix, resolve_model
from moeadapt.errors import MoeAdaptError
from moeadapt.progress import watched
from moeadapt.report.report import load_render

BASE = "embedded:smollm2-135m"
TRAINING_SECONDS = 420
FEWEST_STEPS, MOST_STEPS = 24, 90
TEST_ROWS = 32
TIMING_ROUNDS = 3


class ReloadError(MoeAdaptError, RuntimeError):
    """A saved adapter gave other logits after loading."""


def run_demo(out: str, *, steps: int = 0, as_json: bool = False) -> dict[str, Any]:
    """Run everything and return the results, which are also written to `<out>/results.json`.

    Args:
        out: folder for adapters and results.
        steps: optimizer steps per arm; 0 chooses what trains all arms in about seven minutes.
        as_json: print the results as JSON and nothing else.

    Raises:
        AssetError: the model or a task's package cannot be had.
        ReloadError: a saved adapter does not give the same logits in a new process.
        ConfigError: the checkpoint at the end would have no room below `out`, or what draws the
            report is not installed.
        ExportError: the checkpoint is not the adapter.
    """
    _quiet()
    _keep_freed_memory()
    # A file is wide enough for the table; a terminal decides for itself.
    console = Console(quiet=as_json, width=None if sys.stdout.isatty() else 120)
    folder = Path(out)
    checkpoint = make_room(folder)
    load_render()  # what lacks should be said before ten minutes of training
    base_path = resolve_model(BASE, progress=not as_json)
    tokenizer = AutoTokenizer.from_pretrained(base_path)
    console.print(f"base model {BASE}, tasks {', '.join(TASKS)}, {os.cpu_count()} cores")
    rows, test = _rows(MOST_STEPS * BATCH)
    steps = steps or _affordable_steps(base_path, tokenizer, rows)
    arms = make_arms()

    base = load_base(base_path)
    scores = {"base model": answer_nll(base, tokenizer, test)}
    before = _generate(base, tokenizer, test)
    models: dict[str, Any] = {}
    for arm in arms:
        with _bar(arm.name, steps) as on_step:
            models[arm.name] = train_arm(
                arm, base_path, tokenizer, rows, steps=steps, out=folder, on_step=on_step
            )
        scores[arm.name] = answer_nll(models[arm.name], tokenizer, test)

    results = _results(arms, models, scores, test, steps, tokenizer, rows)
    _show(console, results, scores)
    for arm in arms:
        if arm.is_mixture:
            gap = _reload(models[arm.name], folder / arm.folder, tokenizer, test)
            results["arms"][arm.name]["reload_max_difference"] = gap
            console.print(f"{arm.name}: loaded in a new process, largest logit difference {gap}")
    best = min((a for a in arms if a.is_mixture), key=lambda a: Mean.of(scores[a.name]).value)
    after = _generate(models[best.name], tokenizer, test)
    _show_answers(console, best.name, test, before, after)
    results["report"] = write_report(console, best, models[best.name], tokenizer, test, folder)
    ffn = next(arm for arm in arms if getattr(arm.config, "placement", None) == "ffn")
    console.print(f"{ffn.name}: writing and checking a stock {TARGET} checkpoint")
    receipt = export_stock(models[ffn.name], checkpoint, tokenizer, _one_per_task(test))
    results["export"] = receipt.to_dict()
    console.print(receipt.text())
    console.print(f"AutoModelForCausalLM.from_pretrained({str(checkpoint)!r}) needs no moeadapt")
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    console.print(f"adapters and results: {folder}")
    if as_json:
        print(json.dumps(results, indent=2))
    return results


def _quiet() -> None:
    """Leave the screen to the demo's own bars and tables."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # between TRL and transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _keep_freed_memory() -> None:
    """Tell glibc to reuse freed memory: the kernel clears every page it gives out anew.

    The logits of one batch are over 100 MiB, so without this much time goes to the kernel.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # glibc; musl has none
            libc.mallopt(_MMAP_THRESHOLD, 2**30)
            libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)


# Parameter numbers of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def _rows(train: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    held_out = [load_task(name, train=0, test=TEST_ROWS).test for name in TASKS]
    test = [row for rows_of_task in held_out for row in rows_of_task]
    return mix(TASKS, train=train // len(TASKS)), test


def _affordable_steps(base_path: str, tokenizer: Any, rows: list[dict[str, str]]) -> int:
    arms_cost = 1.3 * len(make_arms())  # the FFN mixture takes longer than a LoRA
    seconds = seconds_per_step(base_path, tokenizer, rows)
    return int(max(FEWEST_STEPS, min(MOST_STEPS, TRAINING_SECONDS / (arms_cost * seconds))))


@contextmanager
def _bar(name: str, steps: int) -> Iterator[Callable[[int, float], None]]:
    """Show a progress bar for one arm; yields what to call with the step and its loss."""
    columns = (
        TextColumn("{task.description:<42}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("loss {task.fields[loss]}"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not watched()) as progress:
        task = progress.add_task(name, total=steps, loss="-")
        yield lambda step, loss: progress.update(task, completed=step, loss=f"{float(loss):.3f}")


def _results(
    arms: list[Arm],
    models: dict[str, Any],
    scores: dict[str, list[float]],
    test: list[dict[str, str]],
    steps: int,
    tokenizer: Any,
    rows: list[dict[str, str]],
) -> dict[str, Any]:
    batch = batch_of(tokenizer, rows[:BATCH], next(iter(models.values())).device)
    rounds = [
        {arm.name: time_step(models[arm.name], batch) for arm in arms} for _ in range(TIMING_ROUNDS)
    ]
    reference = arms[1].name
    table: dict[str, Any] = {}
    for name, values in scores.items():
        nll = {d: vars(m) for d, m in by_domain(test, values).items()}
        table[name] = {"nll": nll, "mean": vars(Mean.of(values))}
        if name in models:
            parameters = [p.numel() for p in models[name].parameters() if p.requires_grad]
            ratios = [turn[name] / turn[reference] for turn in rounds]
            table[name]["trainable"] = sum(parameters)
            table[name]["step_ratio"] = statistics.median(ratios)
    return {
        "base": BASE,
        "steps": steps,
        "batch": BATCH,
        "test_rows_per_task": TEST_ROWS,
        "torch": torch.__version__,
        "arms": table,
        "verdict": verdict({arm.name: scores[arm.name] for arm in arms}),
    }


def _show(console: Console, results: dict[str, Any], scores: dict[str, list[float]]) -> None:
    table = Table(
        title="Held-out loss of the answers, nats per token (± standard error; lower is better)"
    )
    for column in ("", *TASKS, "all", "trainable", "step time"):
        table.add_column(column, justify="left" if not column else "right")
    for name, entry in results["arms"].items():
        cells = [str(Mean(**entry["nll"][task])) for task in TASKS]
        cost = ["", ""]
        if "trainable" in entry:
            cost = [f"{entry['trainable'] / 1e6:.1f} M", f"x{entry['step_ratio']:.2f}"]
        table.add_row(name, *cells, str(Mean(**entry["mean"])), *cost)
    console.print(table)
    console.print(
        f"{results['steps']} steps of {BATCH} rows per arm, one seed, one learning rate for all; "
        "step time relative to plain LoRA of equal total rank, measured in turns."
    )
    console.print(results["verdict"])


def _reload(model: Any, folder: Path, tokenizer: Any, test: list[dict[str, str]]) -> float:
    """Record logits beside the adapter and recompute them in a new process."""
    ids = tokenizer(test[0]["prompt"], return_tensors="pt").input_ids
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids.to(model.device)).logits.cpu()
    save_file({"input_ids": ids, "logits": logits}, folder / PROBE)
    command = [sys.executable, "-m", "moeadapt.demo.reload", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ReloadError(f"loading {folder} in a new process failed:\n{done.stderr[-2000:]}")
    gap = float(done.stdout.split()[-1])
    if gap > 1e-4:  # noqa: PLR2004 - float32 logits of another process
        raise ReloadError(f"{folder}: logits differ by {gap} after loading in a new process")
    return gap


def _generate(model: Any, tokenizer: Any, test: list[dict[str, str]]) -> list[str]:
    """Answer the first held-out question of each task, greedily."""
    model.eval()
    answers = []
    for row in _one_per_task(test):
        inputs = tokenizer(row["prompt"] + "\n", return_tensors="pt").to(model.device)
        made = model.generate(
            **inputs, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        text = tokenizer.decode(made[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        answers.append(text.strip())
    return answers


def _one_per_task(test: list[dict[str, str]]) -> list[dict[str, str]]:
    return [next(row for row in test if row["domain"] == task) for task in TASKS]


def _show_answers(
    console: Console, arm: str, test: list[dict[str, str]], before: list[str], after: list[str]
) -> None:
    table = Table(title=f"Greedy answers before and after: {arm}", show_lines=True)
    for column in ("question", "wanted", "before", "after"):
        table.add_column(column, overflow="fold", max_width=40)
    for row, was, now in zip(_one_per_task(test), before, after, strict=True):
        table.add_row(row["prompt"], row["completion"], was[:200], now[:200])
    console.print(table)
