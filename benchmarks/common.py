"""What every benchmark writes beside its numbers, and the CSV file it appends them to."""

import csv
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]


def device_name(device: str) -> str:
    """Name the GPU, or the CPU as the kernel calls it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str:
    """Return the commit of this tree, with `-dirty` if files differ from it; empty without git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def where(device: str) -> dict[str, Any]:
    """Return the columns that say where and with what a row was measured."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def check_columns(path: Path, columns: Sequence[str]) -> None:
    """Refuse a file whose rows are of another kind; worth asking before hours of measuring.

    Raises:
        ValueError: the file has other columns.
    """
    if not path.exists():
        return
    with path.open(newline="") as file:
        found = next(csv.reader(file), [])
    if found != list(columns):
        raise ValueError(
            f"{path} has the columns {found}, these rows have {list(columns)}; "
            "move the file away or name another one"
        )


def append_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows, with a header if the file is new.

    Raises:
        ValueError: the file has other columns.
    """
    columns = list(rows[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    check_columns(path, columns)
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if fresh:
            writer.writeheader()
        writer.writerows(rows)
