"""Reads the flags of a run as plain data; they win over its recipe file."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from moeadapt.balance import BALANCE
from moeadapt.errors import ConfigError
from moeadapt.training.recipe_file import parse_value

FAULT_OPTIONS = ("on_nonfinite", "check_routers", "allow_partial_resume")
"""Settings of a run that say what happens at a fault; trainers of mixtures take them."""


def refuse_fault_options(run: Any, adapter: Any, source: str) -> None:
    """Refuse them for a plain LoRA, whose trainer is TRL's own.

    Raises:
        ConfigError: one of them is set.
    """
    asked = [name for name in FAULT_OPTIONS if getattr(run, name) not in (False, "stop")]
    if asked and adapter.peft_type == "LORA":
        raise ConfigError(f"{source}: {', '.join(asked)} is for mixtures, not for a plain LoRA")


def read_flags(flags: Sequence[str]) -> dict[str, Any]:
    """Turn `--a.b value` and `--a.b=value` into `{"a.b": value}`; a bare `--flag` is true."""
    values: dict[str, Any] = {}
    rest = list(flags)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise ConfigError(f"unexpected argument {flag!r}; settings are given as --name value")
        name, equals, value = flag[2:].partition("=")
        name = name.replace("-", "_")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        try:
            values[name] = parse_value(value)
        except yaml.YAMLError:
            values[name] = value
    return values


def set_nested(values: dict[str, Any], key: str, value: Any) -> None:
    """Set `values[a][b] = value` for the key `a.b`, with the short forms of YAML written out.

    Raises:
        ConfigError: `a` is a plain value, which has nothing below it.
    """
    *parents, last = key.split(".")
    place = values
    for parent in parents:
        below = place.get(parent)
        if isinstance(below, str):
            below = {"name": below}  # `router: top_k` in the file, `--moe.router.k 1` as a flag
        elif isinstance(below, (int, float)) and parents[:2] == ["moe", "balance"]:
            # `switch: 0.01` in the file, `--moe.balance.switch.coef 0.1` as a flag
            below = {BALANCE[parent].shorthand: below}
        elif below is not None and not isinstance(below, Mapping):
            raise ConfigError(f"flags: --{key}: {parent!r} is {below!r}, which has no settings")
        place[parent] = dict(below or {})
        place = place[parent]
    place[last] = value
