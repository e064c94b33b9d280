"""Reads the section of a recipe that says what is trained: `moe`, or `lora` for a plain LoRA."""

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from peft import LoraConfig, PeftConfig

from moeadapt.errors import ConfigError
from moeadapt.training.objectives import Objective
from moeadapt.training.places import Places
from moeadapt.training.recipe_flat import refuse_unknown
from moeadapt.tuner.config import MoeLoraConfig


def _settings_of(config_class: type) -> set[str]:
    return {f.name for f in fields(config_class)} - {"peft_type", "auto_mapping"}


SECTIONS = {"moe": _settings_of(MoeLoraConfig) | {"preset"}, "lora": _settings_of(LoraConfig)}
"""Section of a recipe that says what is trained -> its settings."""


def read_adapter(values: dict[str, Any], places: Places, goal: Objective) -> PeftConfig:
    """Take the adapter's section out of `values` and build it; without one, the default mixture.

    Args:
        values: the settings of the run.
        places: where they were written.
        goal: what is trained for.

    Raises:
        ConfigError: both sections, an unknown setting, or a value that does not do; names the line.
    """
    given = [name for name in SECTIONS if name in values]
    if len(given) > 1:
        raise ConfigError(f"{places.of('lora')}: 'moe' and 'lora' exclude each other")
    section = given[0] if given else "moe"
    settings = values.pop(section, None) or {}
    if not isinstance(settings, Mapping):
        raise ConfigError(
            f"{places.of(section)}: {section!r} must be a mapping of the adapter's settings"
        )
    refuse_unknown(settings, SECTIONS[section], places, section)
    if settings.get("task_type", goal.task_type) != goal.task_type:
        raise ConfigError(
            f"{places.of(section, 'task_type')}: {section}.task_type={settings['task_type']!r}, "
            f"but {goal.name} trains {goal.task_type}; leave it out"
        )
    settings = {**settings, "task_type": goal.task_type}
    try:
        return _plain_lora(settings) if section == "lora" else _mixture(settings)
    except ConfigError as error:
        raise ConfigError(f"{places.mentioned(str(error), section)}: {error}") from None


def _mixture(settings: dict[str, Any]) -> MoeLoraConfig:
    preset = settings.pop("preset", None)
    if preset is None:
        return MoeLoraConfig(**settings)
    return MoeLoraConfig.preset(preset, **settings)


def _plain_lora(settings: Mapping[str, Any]) -> LoraConfig:
    try:
        config = LoraConfig(**settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"lora: {error}") from None
    names = config.target_modules
    if not isinstance(names, str | list | set | None):
        raise ConfigError(f"lora.target_modules={names!r} must be a name, or a list of names")
    # PEFT looks at these while it builds, some not at all.
    whole = isinstance(config.r, int) and not isinstance(config.r, bool)
    if not whole or config.r < 1:
        raise ConfigError(f"lora.r={config.r!r} must be a whole number of at least 1")
    numbers = {"lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}
    for name, value in numbers.items():
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or not math.isfinite(value)
        ):
            raise ConfigError(f"lora.{name}={value!r} must be a number")
    if not 0.0 <= config.lora_dropout < 1.0:
        raise ConfigError(f"lora.lora_dropout={config.lora_dropout} must be in [0, 1)")
    return config
