"""How a preset and the fields that a user gives beside it become one config."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from moeadapt.balance import BALANCE
from moeadapt.errors import ConfigError, did_you_mean
from moeadapt.presets import PRESETS


def preset_fields(name: object, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of preset `name` with `overrides`, which win.

    Most fields are replaced. `router` and `experts` keep the preset's other options, unless
    another component is named; `balance` keeps the losses and options that are not mentioned, a
    loss given as None is left out, and None or an empty mapping means no loss at all.

    Raises:
        ConfigError: no such preset; the message lists what there is.

    Example:
        >>> preset_fields("mixlora", {"router": {"k": 1}})["router"]
        {'name': 'top_k', 'k': 1}
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(
            f"unknown preset {name!r}; one of {sorted(PRESETS)}{did_you_mean(name, PRESETS)}"
        )
    fields = deepcopy(dict(PRESETS[name].fields))
    for key, value in overrides.items():
        if key in ("router", "experts"):
            fields[key] = _merge_component(fields.get(key), value)
        elif key == "balance":
            fields[key] = _merge_balance(fields.get(key), value)
        else:
            fields[key] = value
    return fields


def _merge_component(ours: Any, given: Any) -> Any:
    if ours is None:
        return given
    ours, given = _named(ours), _named(given)
    if not isinstance(given, Mapping) or given.get("name", ours["name"]) != ours["name"]:
        return given
    return {**ours, **given}


def _named(spec: Any) -> Any:
    return {"name": spec} if isinstance(spec, str) else spec


def _merge_balance(ours: Any, given: Any) -> Any:
    if not ours or not given or not isinstance(given, Mapping):
        return given
    merged = dict(ours)
    for loss, value in given.items():
        if value is None:
            merged.pop(loss, None)
        else:
            merged[loss] = {**_options(loss, merged.get(loss)), **_options(loss, value)}
    return merged


def _options(name: str, loss: Any) -> dict[str, Any]:
    if loss is None:
        return {}
    return dict(loss) if isinstance(loss, Mapping) else {BALANCE[name].shorthand: loss}
