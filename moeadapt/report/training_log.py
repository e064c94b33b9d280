"""Reads the loss and the `moe/` metrics that a trainer logged, from its trainer_state.json."""

import json
import math
from pathlib import Path
from typing import Any

from moeadapt.errors import ConfigError
from moeadapt.report.data import TrainingPoint

NAME = "trainer_state.json"


def read_training_log(path: str | Path) -> list[TrainingPoint]:
    """Return the logged steps in order; only `loss` and `moe/` numbers that are finite.

    Args:
        path: a trainer_state.json, or a folder with one, or with `checkpoint-<step>` folders, of
            which the last that has one is read.

    Raises:
        ConfigError: there is none, or it is damaged or without a log.
    """
    file = find_training_log(path)
    try:
        state: Any = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{file} is damaged: {error}") from None
    history = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(history, list):
        raise ConfigError(f"{file} has no log_history; give the {NAME} of a trainer")
    steps: dict[int, dict[str, float]] = {}
    for entry in history:
        if isinstance(entry, dict) and isinstance(step := entry.get("step"), int):
            found = {name: float(value) for name, value in entry.items() if _shown(name, value)}
            if found:
                steps.setdefault(step, {}).update(found)
    return [TrainingPoint(step=step, values=steps[step]) for step in sorted(steps)]


def find_training_log(path: str | Path) -> Path:
    """Return the file that `read_training_log` reads.

    Raises:
        ConfigError: there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    if (path / NAME).is_file():
        return path / NAME
    steps = {
        int(number): found
        for found in path.glob(f"checkpoint-*/{NAME}")
        if (number := found.parent.name.removeprefix("checkpoint-")).isdecimal()
    }
    if not steps:
        what = f"{path} and its checkpoint-* folders hold no {NAME}"
        what = what if path.is_dir() else f"{path} does not exist"
        raise ConfigError(f"{what}; give a {NAME}, or the output folder of a trainer")
    return steps[max(steps)]


def _shown(name: Any, value: Any) -> bool:
    wanted = name == "loss" or str(name).startswith("moe/")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return wanted and number and math.isfinite(value)
