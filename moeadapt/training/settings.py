"""Reads the settings of a run as plain data: a YAML file, and flags that win over it."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from moeadapt.balance import BALANCE
from moeadapt.errors import ConfigError


class Loader(yaml.SafeLoader):
    """Safe YAML without two surprises of YAML 1.1: 1e-3 is a number, and `no` is a word."""


_BOOL = "tag:yaml.org,2002:bool"
Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(
    _BOOL, re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def read_yaml(path: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the mapping in the file, and `file:line` of each top-level key."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror}") from None
    try:
        node = yaml.compose(text, Loader=Loader)
        values = yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict) or not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}: a recipe is a mapping of settings, found {type(values)}")
    places = {key.value: f"{path}:{key.start_mark.line + 1}" for key, _ in node.value}
    return values, places


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
            values[name] = yaml.load(value, Loader=Loader)
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
