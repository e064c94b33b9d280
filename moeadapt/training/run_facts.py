"""What must stay the same between a run and its continuation: adapter, data, steps, objective."""

import hashlib
import json
from collections.abc import Mapping, Sized
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from moeadapt.adapter_format.files import exists
from moeadapt.adapter_format.settings import MAX_BYTES, SETTINGS, read_object
from moeadapt.tuner.same_settings import FREE

SAMPLED = 1024
"""Rows of the data that are hashed, evenly spread."""

_ARGUMENTS = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "seed", "data_seed"),
    *("dataloader_drop_last", "train_sampling_strategy"),
)
"""They decide which row is in which step."""

_OPTIMIZER = (
    *("optim", "optim_args", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2"),
    *("adam_epsilon", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("max_grad_norm", "label_smoothing_factor", "neftune_noise_alpha", "bf16", "fp16"),
)
"""They decide what a step does; the state of the optimizer would overrule some without a word."""

_OBJECTIVE = (
    *("beta", "loss_type", "loss_weights", "label_smoothing", "ld_alpha", "use_weighting"),
    *("f_divergence_type", "f_alpha_divergence_coef", "discopop_tau", "desirable_weight"),
    *("undesirable_weight", "center_rewards_coefficient", "router_aux_loss_coef"),
    *("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps", "disable_dropout"),
    *("completion_only_loss", "assistant_only_loss", "max_length", "truncation_mode"),
    *("epsilon", "epsilon_high", "delta", "num_iterations", "num_generations"),
    *("steps_per_generation", "max_completion_length", "temperature"),
    *("importance_sampling_level", "reward_weights", "multi_objective_aggregation"),
    *("scale_rewards", "normalize_advantages", "mask_truncated_completions"),
    *("top_entropy_quantile", "entropy_coef"),
)
"""What TRL's arguments add and the losses are made of; how completions are generated is free."""

_LENGTH = "length"

_ENDLESS = ("constant", "reduce_lr_on_plateau", "greedy")
"""Schedules that do not ask how long the run is."""

_ENDLESS_AFTER_WARMUP = ("constant_with_warmup", "inverse_sqrt")
"""Nor do these, unless their warm-up is a part of the run."""


def run_facts(args: Any, rows: Any) -> dict[str, Any]:
    """Return the facts of a run, as plain data.

    Args:
        args: the trainer's arguments.
        rows: its training data, after the trainer has prepared it.
    """
    names = (*_ARGUMENTS, *_OPTIMIZER, *(one for one in _OBJECTIVE if hasattr(args, one)))
    facts = {name: _word(getattr(args, name, None)) for name in names}
    length = "max_steps" if args.max_steps > 0 else "num_train_epochs"
    facts[_LENGTH] = f"{length}={getattr(args, length)}"
    return {**facts, "world_size": args.world_size, **_data_facts(rows)}


def changed_facts(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the differences, as lines `name: then -> now`.

    What an older version did not write down is not compared; see `changed_length` for the length.
    """
    return [
        f"{name}: {then[name]!r} -> {value!r}"
        for name, value in now.items()
        if name in then and then[name] != value and name != _LENGTH
    ]


def changed_length(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Say what another length of the run means for its schedule; empty: nothing.

    Args:
        then: facts of the run as it was started.
        now: those of its continuation.
    """
    before, after = then.get(_LENGTH), now[_LENGTH]
    name, warmup = now["lr_scheduler_type"], now["warmup_steps"] or 0
    endless = name in _ENDLESS or (name in _ENDLESS_AFTER_WARMUP and not 0 < warmup < 1)
    if before is None or before == after or endless:
        return ""
    return (
        f"the run was started with {before} and goes on with {after}: the learning rates of the "
        f"schedule {name!r} depend on it, so from here they are those of the new length, and the "
        f"result is not that of one run with {after}"
    )


def changed_adapter(checkpoint: Path, configs: Mapping[str, Any]) -> list[str]:
    """Return how the adapters' settings differ from those in a checkpoint.

    Args:
        checkpoint: its folder, found complete.
        configs: adapter name -> its settings in the model.

    Raises:
        AdapterFileError: the settings cannot be read.
    """
    lines = []
    for name, config in configs.items():
        folder = checkpoint if name == "default" else checkpoint / name
        if not exists(folder, SETTINGS):
            continue
        then = _sorted_lists(read_object(folder, SETTINGS, MAX_BYTES))
        now = _sorted_lists(json.loads(json.dumps(config.to_dict(), default=_plain)))
        kept = {key: value for key, value in now.items() if key not in FREE}
        lines += changed_facts(then, kept)
    return lines


def _data_facts(rows: Any) -> dict[str, Any]:
    """Hash some rows, but none of a stream, which cannot be looked at twice."""
    if not isinstance(rows, Sized) or not hasattr(rows, "__getitem__"):
        return {"data_rows": "a stream"}
    count = len(rows)
    digest = hashlib.sha256()
    for place in sorted({i * count // SAMPLED for i in range(SAMPLED)} if count else ()):
        digest.update(json.dumps(_simple(rows[place]), sort_keys=True).encode())  # type: ignore[index]
    return {"data_rows": count, "data_sha256": digest.hexdigest()}


def _word(value: Any) -> Any:
    """Return an argument as plain data: names of optimizers and schedules are enums."""
    # No arguments for a schedule are written as None or as {}.
    return None if value == {} else _simple(getattr(value, "value", value))


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
