"""What must stay the same between a run and its continuation: adapter, data, batches, seed."""

import hashlib
import json
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from moeadapt.adapter_folder import SETTINGS
from moeadapt.tuner.same_settings import FREE

SAMPLED = 1024
"""Rows of the data that are hashed, evenly spread."""

_ARGUMENTS = ("per_device_train_batch_size", "gradient_accumulation_steps", "seed", "data_seed")
"""They decide which row is in which step."""

_OPTIMIZER = (
    *("optim", "optim_args", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2"),
    *("adam_epsilon", "lr_scheduler_type", "max_grad_norm", "label_smoothing_factor"),
    *("bf16", "fp16"),
)
"""They decide what a step does; the state of the optimizer would overrule some without a word."""


def run_facts(args: Any, rows: Any) -> dict[str, Any]:
    """Return the facts of a run, as plain data.

    Args:
        args: the trainer's arguments.
        rows: its training data, after the trainer has prepared it.
    """
    facts = {name: _word(getattr(args, name, None)) for name in (*_ARGUMENTS, *_OPTIMIZER)}
    return {**facts, "world_size": args.world_size, **_data_facts(rows)}


def changed_facts(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the differences, as lines `name: then -> now`."""
    return [
        f"{name}: {then[name]!r} -> {value!r}"
        for name, value in now.items()
        if name in then and then[name] != value
    ]


def changed_adapter(checkpoint: Path, configs: Mapping[str, Any]) -> list[str]:
    """Return how the adapters' settings differ from those in a checkpoint.

    Args:
        checkpoint: its folder, found complete.
        configs: adapter name -> its settings in the model.
    """
    lines = []
    for name, config in configs.items():
        path = (checkpoint if name == "default" else checkpoint / name) / SETTINGS
        if not path.is_file():
            continue
        then = _sorted_lists(json.loads(path.read_text(encoding="utf-8")))
        now = _sorted_lists(json.loads(json.dumps(config.to_dict(), default=_plain)))
        kept = {key: value for key, value in now.items() if key not in FREE}
        lines += changed_facts(then, kept)
    return lines


def _data_facts(rows: Any) -> dict[str, Any]:
    """Hash some rows; nothing for a stream, which cannot be looked at twice."""
    if not isinstance(rows, Sized) or not hasattr(rows, "__getitem__"):
        return {}
    count = len(rows)
    digest = hashlib.sha256()
    for place in sorted({i * count // SAMPLED for i in range(SAMPLED)} if count else ()):
        digest.update(json.dumps(_simple(rows[place]), sort_keys=True).encode())  # type: ignore[index]
    return {"data_rows": count, "data_sha256": digest.hexdigest()}


def _word(value: Any) -> Any:
    """Return an argument as plain data: names of optimizers and schedules are enums."""
    return getattr(value, "value", value)


def _simple(value: Any) -> Any:
    """Return what of `value` is the same in every process."""
    if isinstance(value, Mapping):
        return {str(key): _simple(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_simple(item) for item in value]
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, str | int | float | bool | None):
        return value
    return type(value).__name__


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set | frozenset) else str(value)


def _sorted_lists(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A set of names is saved as a list in any order."""
    found = dict(settings)
    for key, value in found.items():
        if key.endswith("modules") and isinstance(value, list):
            found[key] = sorted(value, key=str)
    return found
