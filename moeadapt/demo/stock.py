"""Writes the demo's FFN mixture as a stock Mixtral checkpoint, checked on held-out text."""

import shutil
from pathlib import Path
from typing import Any

from moeadapt.export.export import export
from moeadapt.export.receipt import RECEIPT, Receipt
from moeadapt.hidden_folder import check_folder

TARGET = "mixtral"
BYTES = 1_600_000_000
"""What the checkpoint takes on disk: the base's 0.54 GB, and three more of its 0.32 GB of FFNs."""


def make_room(folder: Path) -> Path:
    """Return where the checkpoint goes; that of an earlier demo is removed.

    Raises:
        ConfigError: something else is there, or the disk has too little room.
    """
    place = (folder / TARGET).absolute()
    if (place / RECEIPT).is_file():
        shutil.rmtree(place)
    check_folder(place, BYTES)
    return place


def export_stock(model: Any, place: Path, tokenizer: Any, rows: list[dict[str, str]]) -> Receipt:
    """Write, load and compare; returns the receipt.

    Raises:
        ExportError: the checkpoint does not compute what the adapter does.
    """
    texts = [row["prompt"] + "\n" + row["completion"] for row in rows]
    return export(
        model,
        place,
        target=TARGET,
        engines=("transformers", "vllm", "sglang", "llama.cpp"),
        probe=[tokenizer(text).input_ids for text in texts],
        tokenizer=tokenizer,
    )
