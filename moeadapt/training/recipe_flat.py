"""Reads the settings of a recipe outside its adapter: model, data, and TRL's own arguments."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from transformers import HfArgumentParser

from moeadapt.errors import ConfigError, did_you_mean
from moeadapt.training.places import Places

LEAST: dict[str, float] = {
    "dataloader_num_workers": 0,
    "dataset_size": 0,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0.0,
    "max_completion_length": 1,
    "max_grad_norm": 0.0,
    "max_length": 1,
    "max_steps": -1,
    "num_train_epochs": 0.0,
    "per_device_eval_batch_size": 1,
    "per_device_train_batch_size": 1,
    "save_total_limit": 1,
    "seed": 0,
    "warmup_steps": 0,
    "weight_decay": 0.0,
}
"""Setting -> least value. TRL and transformers find these late, in odd words, or not at all."""

MOST: dict[str, int] = {"data_seed": 2**32 - 1, "seed": 2**32 - 1}
"""Setting -> largest value: that of NumPy's generators."""

NEEDS_PACKAGE = ("deepspeed", "fsdp", "optim", "report_to")
"""Settings that may ask for a package of their own."""

BELOW: dict[str, float] = {"adam_beta1": 1.0, "adam_beta2": 1.0}
"""Setting -> what it must be below."""


def refuse_unknown(
    values: Mapping[str, Any], known: set[str], places: Places, section: str | None = None
) -> None:
    """Refuse a setting that does not exist.

    Raises:
        ConfigError: names its line, and the nearest setting that does exist.
    """
    path, prefix = ((section,), f"{section}: ") if section else ((), "")
    for key in values:
        if key not in known:
            place = places.of(*path, str(key))
            raise ConfigError(f"{place}: {prefix}unknown setting {key!r}{did_you_mean(key, known)}")


def read_flat(
    classes: Sequence[type], values: Mapping[str, Any], places: Places
) -> tuple[Any, ...]:
    """Let argparse convert and check every value as if it had been typed as a flag.

    Args:
        classes: dataclasses that share the settings between them.
        values: the settings, none of them unknown.
        places: where they were written.

    Returns:
        An object of each class.

    Raises:
        ConfigError: a value has the wrong type or is out of range, or one is missing; names the
            line.
    """
    parser = _Parser(list(classes), allow_abbrev=False)  # type: ignore[arg-type]
    parser.places = places
    # A null in the file means "no value", which no flag can say.
    parser.set_defaults(**{key: None for key, value in values.items() if value is None})
    argv = []
    for key, value in values.items():
        if value is None:
            continue
        _refuse_out_of_range(key, value, places)
        if key.endswith("_kwargs") and not isinstance(value, dict):
            raise ConfigError(f"{places.of(key)}: {key}={value!r} must be a mapping of settings")
        if isinstance(value, list) and parser.takes_one(key):
            raise ConfigError(f"{places.of(key)}: {key}={value!r} must be one value, not a list")
        words = value if isinstance(value, list) else [value]
        argv += [f"--{key}", *(_word(word) for word in words)]
    try:
        return parser.parse_args_into_dataclasses(args=argv)
    except ConfigError:
        raise
    except ImportError as error:
        asked = [key for key in NEEDS_PACKAGE if values.get(key)]
        raise ConfigError(
            f"{places.of(*asked[:1])}: {asked[0] if asked else 'a setting'} needs a package that "
            f"is not installed: {error}"
        ) from None
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(f"{places.mentioned(str(error))}: {error}") from None


def _refuse_out_of_range(key: str, value: Any, places: Places) -> None:
    if not isinstance(value, int | float):
        return
    wrong = None
    if not math.isfinite(value):
        wrong = "must be a finite number"
    elif key in LEAST and value < LEAST[key]:
        wrong = f"must be at least {LEAST[key]:g}"
    elif key in MOST and value > MOST[key]:
        wrong = f"must be at most {MOST[key]}"
    elif key in BELOW and not 0.0 <= value < BELOW[key]:
        wrong = f"must be in [0, {BELOW[key]:g})"
    if wrong:
        raise ConfigError(f"{places.of(key)}: {key}={value!r} {wrong}")


class _Parser(HfArgumentParser):
    """argparse with our errors: no usage of two hundred lines, no abbreviations."""

    places = Places()

    def takes_one(self, key: str) -> bool:
        """Whether a setting is a single value."""
        return self._option_string_actions[f"--{key}"].nargs in (None, "?")

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.places.mentioned(message)}: {message}")


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (dict, bool)) else str(value)
