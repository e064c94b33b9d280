"""One run: the check, then every measurement, then the tables, the goals and the CSV file."""

import argparse
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from benchmarks.common import append_csv, where
from benchmarks.speed import ffn, gpu, imports, linear, model
from benchmarks.speed.case import Sizes
from benchmarks.speed.measure import Measured
from benchmarks.speed.presets import FULL, GPU, QUICK, TOY, Preset, Rounds
from benchmarks.speed.rows import rows_of, show
from moeadapt.embedded import MODELS, cache_folder, resolve_model

PARTS = ("linear", "ffn", "llama", "smollm2", "imports")
BASE = "embedded:smollm2-135m"
CSV = Path("benchmarks/results/speed.csv")


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.speed", description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="the main numbers, under 3 minutes")
    size.add_argument("--toy", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="parts to run, all if left out")
    parser.add_argument("--smollm2", action="store_true", help=f"{BASE}, downloaded if need be")
    parser.add_argument("--csv", type=Path, default=CSV, help="file to append rows to")
    parser.add_argument("--no-csv", action="store_true", help="print only")
    args = parser.parse_args(arguments)
    if args.device == "cuda":
        if args.quick or args.toy:
            parser.error("--device cuda has sizes of its own; leave out --quick and --toy")
        if not torch.cuda.is_available():
            parser.error("--device cuda: torch sees no CUDA device")
    return args


def preset_of(args: argparse.Namespace) -> Preset:
    """Return the sizes that the command line asks for."""
    if args.toy:
        return TOY
    if args.device == "cuda":
        return GPU
    return QUICK if args.quick else FULL


def check(preset: Preset, parts: tuple[str, ...]) -> list[str]:
    """Compare every form that will be timed with its slow definition; return what is off.

    Arrow routes by itself, so in bfloat16, where it may choose otherwise, it is not compared.
    """
    wrong: list[str] = []
    if "linear" in parts or "llama" in parts:
        wrong += linear.check(preset.linear)
    if "ffn" in parts or "llama" in parts:
        wrong += ffn.check(preset.ffn)
    if "llama" in parts or "smollm2" in parts:
        cells = [sizes for _, sizes, _ in preset.llama]
        shapes = {(sizes.experts, sizes.rank, sizes.k) for sizes in cells}
        wrong += model.check(shapes, cells[0].device)
    return wrong


def jobs(
    preset: Preset, parts: tuple[str, ...], download: bool
) -> list[tuple[str, Callable[[], list[Measured]]]]:
    """Return what is measured, by name, in order."""
    found: list[tuple[str, Callable[[], list[Measured]]]] = []
    if "linear" in parts:
        found += [("linear", partial(linear.measure, *cell)) for cell in preset.linear]
    if "ffn" in parts:
        found += [("ffn", partial(ffn.measure, *cell)) for cell in preset.ffn]
    if "llama" in parts:
        arms = list(preset.arms) if preset.arms else None
        for shape, sizes, rounds in preset.llama:
            found.append(("llama", partial(model.measure_random, shape, sizes, rounds, arms)))
            if sizes.device == "cuda":
                found.append(("CUDA graphs", partial(gpu.measure, shape, sizes, rounds[0])))
    cached = (cache_folder() / MODELS[BASE].folder / "model.safetensors").is_file()
    if "smollm2" in parts and (download or (cached and preset.smollm2)):
        found.append(("smollm2", partial(smollm2, *(preset.smollm2 or (96, (3, 3))))))
    if "imports" in parts and preset.imports:
        found.append(("imports", partial(imports.measure, preset.imports)))
    return found


def smollm2(tokens: int, rounds: Rounds) -> list[Measured]:
    """Time the built-in real model, in float32."""
    path = resolve_model(BASE)
    sizes = Sizes(tokens, 576, 576, 8, 8, 2)
    ids = torch.randint(1, 1000, (1, tokens))
    load = partial(AutoModelForCausalLM.from_pretrained, path, dtype=torch.float32)
    arms = ["base", "lora_r", "lora_Nr", "ours_layer", "ours_block", "ours_ffn", "loop_layer"]
    return model.measure("smollm2", load, ids, sizes, rounds, arms)


def main(arguments: list[str] | None = None) -> int:
    """Run; returns 1, and prints no time, if a form computes something else than its definition."""
    args = parse_args(arguments)
    if args.device == "cpu":
        torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
    preset, parts = preset_of(args), tuple(args.only or PARTS)
    print("checking every form against its definition", file=sys.stderr, flush=True)
    if wrong := check(preset, parts):
        print("wrong results, so nothing is timed:", *wrong, sep="\n  ")
        return 1
    todo = jobs(preset, parts, args.smollm2)
    if not todo:
        print("nothing to measure: these parts have no sizes in this preset; see --help")
        return 2
    results: list[Measured] = []
    for done, (name, job) in enumerate(todo, 1):
        print(f"measuring {done}/{len(todo)}: {name}", file=sys.stderr, flush=True)
        results += job()
    place = where(args.device)
    header = "  ".join(f"{name}: {value}" for name, value in place.items())
    wide = None if sys.stdout.isatty() else 160
    show(results, header, Console(file=sys.stdout, width=wide))
    if results and not args.no_csv:
        rows = [{**row, **place} for measured in results for row in rows_of(measured)]
        append_csv(args.csv, rows)
        print(f"{len(rows)} rows appended to {args.csv}")
    return 0
