"""What makes a checkpoint complete: its files, and a marker that is written last and names them."""

import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from moeadapt.adapter_format.files import exists, open_file
from moeadapt.adapter_format.manifest import sha256_of
from moeadapt.adapter_format.settings import MAX_BYTES, SETTINGS, WEIGHTS, read_object
from moeadapt.errors import AdapterFileError

MARKER = "moeadapt_checkpoint.json"
"""Names every other file with its size and sha256."""

STATE = "trainer_state.json"
OPTIMIZER, SCHEDULER, SCALER = "optimizer.pt", "scheduler.pt", "scaler.pt"
COUNTS = "router_counts.safetensors"
"""The statistics of the routers since the last log."""

_SENTINEL = "checkpoint-is-incomplete.txt"
"""What transformers leaves in a checkpoint that it could not finish."""

_FORMAT = 1

MAX_MARKER = 1 << 24
"""Bytes; more than 100000 files fit."""

MAX_STATE = 1 << 30
"""Bytes; 250000 logs of 100 numbers fit."""

_LONGEST = 255
"""Bytes of a file's name."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What is wrong with a checkpoint; nothing: it is complete.

    Attributes:
        damaged: files that are not what was saved: an older checkpoint has to do.
        missing: state of the trainer that is not there, so that a resumed run would differ.
        hostile: files that ask for code to be run.
    """

    damaged: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    hostile: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.damaged or self.missing or self.hostile)


def checkpoint_folder(args: Any, state: Any) -> Path:
    """Return the folder of a stock trainer's checkpoint of now."""
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"


def write_marker(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the marker of a folder whose files are all there.

    Args:
        folder: the checkpoint.
        facts: what a resumed run is compared with, see `run_facts`; and what it goes on from.
    """
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARKER)
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _hash(path)}
        for path in found
    }
    text = json.dumps({"format": _FORMAT, **facts, "files": files}, indent=2) + "\n"
    partial = folder / f".{MARKER}.partial"
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, folder / MARKER)


def read_marker(folder: str | Path) -> dict[str, Any]:
    """Return what the marker says; nothing if there is none that can be read."""
    try:
        return read_object(Path(folder), MARKER, MAX_MARKER)
    except AdapterFileError:
        return {}


def inspect_checkpoint(folder: Path, needs: Iterable[str], *, sharded: bool = False) -> Findings:
    """Look for what is wrong with a checkpoint; loads no weights and runs nothing.

    Args:
        folder: the checkpoint.
        needs: names of the files that hold the trainer's state.
        sharded: whether weights and optimizer are kept in the format of FSDP or DeepSpeed.
    """
    found = Findings()
    if not folder.is_dir() or not any(folder.iterdir()):
        found.damaged.append("it is empty" if folder.is_dir() else "it is no folder")
        return found
    if (folder / _SENTINEL).exists():
        found.damaged.append(f"{_SENTINEL} says that it was not finished")
    if (problem := _state_problem(folder)) is not None:
        found.damaged.append(f"{STATE} {problem}")
    if not sharded:
        found.damaged.extend(_adapter_problems(folder))
    needs = list(needs)
    if (folder / MARKER).exists():
        _compare(folder, needs, found)
    found.missing.extend(n for n in needs if not (folder / n).is_file() and n not in found.missing)
    if not found.damaged:
        for name in needs:
            if (folder / name).is_file():
                _try_load(folder, name, found)
    return found


def _state_problem(folder: Path) -> str | None:
    """Say why transformers could not go on from the state of its trainer."""
    if not exists(folder, STATE):
        return "is missing"
    try:
        state = read_object(folder, STATE, MAX_STATE)
    except AdapterFileError as error:
        return f"is cut off or damaged ({error})"
    unknown = sorted(set(state) - {one.name for one in fields(TrainerState)})
    if unknown:
        return f"has fields that the installed transformers does not know: {unknown[:5]}"
    if type(state.get("global_step")) is not int:
        return "has no global_step"
    if not isinstance(state.get("log_history", []), list):
        return "has a log that is no list"
    if not isinstance(state.get("stateful_callbacks", {}), dict | None):
        return "has stateful_callbacks that are no object"
    best = state.get("best_model_checkpoint")
    return None if isinstance(best, str | None) else "has a best_model_checkpoint that is no path"


def _adapter_problems(folder: Path) -> list[str]:
    homes = [path.parent for path in folder.rglob(SETTINGS)] or [folder]
    problems = []
    for home in homes:
        if not exists(home, WEIGHTS):
            problems.append(f"{WEIGHTS} is missing")
        else:
            try:
                # safetensors would wait for the writer of a pipe.
                open_file(home, WEIGHTS).close()
                with safe_open(home / WEIGHTS, framework="pt") as weights:
                    weights.keys()
            except (AdapterFileError, SafetensorError, OSError, RuntimeError) as error:
                problems.append(f"{WEIGHTS} is cut off or damaged ({error})")
        try:
            read_object(home, SETTINGS, MAX_BYTES)
        except AdapterFileError as error:
            problems.append(f"{SETTINGS} cannot be read ({error})")
    return problems


def _compare(folder: Path, needs: list[str], found: Findings) -> None:
    """Compare the files with the marker."""
    marker = read_marker(folder)
    if marker.get("format", _FORMAT) != _FORMAT:
        found.damaged.append(
            f"{MARKER} has format {marker['format']!r}; this version reads {_FORMAT}"
        )
        return
    files = marker.get("files")
    counted = type(marker.get("skipped_steps", 0)) is int
    if (
        not counted
        or not isinstance(files, dict)
        or not all(_is_entry(*item) for item in files.items())
    ):
        found.damaged.append(f"{MARKER} is cut off or damaged")
        return
    for name, said in files.items():
        path = folder / name
        if not path.is_file():
            (found.missing if name in needs else found.damaged).append(
                name if name in needs else f"{name} is missing"
            )
        elif path.stat().st_size != said.get("size"):
            found.damaged.append(
                f"{name} has {path.stat().st_size} bytes, and {said.get('size')} were saved"
            )
        else:
            try:
                if sha256_of(folder, name) != said.get("sha256"):
                    found.damaged.append(f"{name} was changed after it was saved (sha256)")
            except AdapterFileError as error:
                found.damaged.append(f"{name} cannot be read ({error})")


def _is_entry(name: str, said: Any) -> bool:
    """Whether a marker may say this: files are below the checkpoint, with names a disk can hold."""
    path = Path(name)
    try:
        longest = max((len(part.encode()) for part in path.parts), default=0)
    except UnicodeEncodeError:  # half a character, which JSON can hold, and no terminal shows
        return False
    outside = path.is_absolute() or ".." in path.parts
    return isinstance(said, dict) and not outside and longest <= _LONGEST


def _try_load(folder: Path, name: str, found: Findings) -> None:
    """Read a pickled file as plain data, without its tensors."""
    path = folder / name
    try:
        with open_file(folder, name) as file, safe_globals():
            torch.load(file, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        # An intact archive was not cut off: what it says is what torch does not read as data.
        if zipfile.is_zipfile(path) or "global" in str(error).lower():
            found.hostile.append(path.name)
        else:
            found.damaged.append(f"{path.name} is cut off or damaged")
    except Exception as error:  # whatever a damaged archive makes torch raise
        found.damaged.append(f"{path.name} is cut off or damaged ({type(error).__name__})")


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
