"""Every base and target: largest float32 logit difference, sizes, and what each engine does.

    PYTHONPATH=. python benchmarks/exports.py --csv benchmarks/results/exports.csv

Tiny random models (the bases of the tests, logits of about 5), one row per pair: a dense base
upcycled to 4 copies, a mixture of whole FFNs, and small experts beside the FFN. Differences are
those of the receipts, which load the written checkpoint as a stock class and run its experts
`eager` and `grouped_mm`.
"""

import argparse
import csv
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from common import device_name

import moeadapt
from moeadapt.errors import UnsupportedError
from moeadapt.export.engines import ENGINES
from moeadapt.export.receipt import Receipt
from moeadapt.export.targets import EXPORTERS
from tests.export.bases import ADDITIVE, BASES, base
from tests.tiny import adapt, moe_config

FFN = {"qwen3_5": ["gate_proj", "up_proj", "down_proj"], "lfm2": ["w1", "w2", "w3"]}
"""Bases whose attention takes no merged LoRA here (fused or convolutional)."""


def jobs() -> list[tuple[str, str, str]]:
    """Return what is measured: the work, the base and the target."""
    plain = [name for name in BASES if "," not in name or "biases" in name or "window" in name]
    whole = [(work, name, BASES[name][2]) for name in plain for work in ("upcycle", "ffn")]
    small = [("glu", name, target) for name, targets in ADDITIVE.items() for target in targets]
    return whole + small


def measure(work: str, name: str, target: str, folder: Path) -> Receipt:
    """Write one checkpoint and return its receipt.

    Raises:
        UnsupportedError: the class does not hold this mixture.
    """
    if work == "upcycle":
        return moeadapt.upcycle(base(name), folder, 4, 2, target)
    router = {"name": "top_k", "k": 2, "init_std": 0.5}
    if EXPORTERS[target].scoring == "sigmoid":
        router["name"] = "sigmoid"
    overrides: dict[str, Any] = {"router": router}
    if name in FFN and work == "ffn":
        overrides["target_modules"] = FFN[name]
    model = adapt(base(name), moe_config(work, **overrides))
    return moeadapt.export(model, folder, target)


def row_of(work: str, name: str, target: str, receipt: Receipt) -> dict[str, Any]:
    """Return a line of the table."""
    assert receipt.measured is not None
    verdicts = {verdict.engine: verdict.status for verdict in receipt.engines}
    differences = receipt.settings.get("logit_difference") or {}
    return {
        "work": work,
        "base": name,
        "target": target,
        "max_difference": f"{receipt.measured.max_logit_difference:.1e}",
        "eager": f"{differences['eager']:.1e}" if differences else "",
        "grouped_mm": f"{differences['grouped_mm']:.1e}" if differences else "",
        "largest_logit": f"{receipt.measured.largest_logit:.1f}",
        "bytes": receipt.bytes_on_disk,
        "base_bytes": receipt.base_bytes,
        **{engine: verdicts.get(engine, "") for engine in ENGINES},
        "device": device_name("cpu"),
        "torch_version": torch.__version__,
        "transformers_version": transformers.__version__,
    }


def main() -> None:
    """Measure all pairs, print a table and write the CSV file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    rows = []
    for work, name, target in jobs():
        with tempfile.TemporaryDirectory() as scratch:
            try:
                receipt = measure(work, name, target, Path(scratch) / "out")
            except UnsupportedError as error:
                print(f"{work} {name} {target}: refused: {error}")
                continue
        rows.append(row_of(work, name, target, receipt))
        print("  ".join(str(value) for value in list(rows[-1].values())[:-3]), flush=True)
    if options.csv:
        with open(options.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
