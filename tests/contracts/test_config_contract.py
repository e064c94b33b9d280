"""What every config class promises, checked for all of them at once."""

import contextlib
import inspect
import json
import sys
from typing import Any, get_args, get_origin

import pytest
import torch
from pydantic.fields import FieldInfo

from moeadapt.errors import ConfigError
from tests.contracts.kit import (
    entries,
    fields,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@entries
def test_a_default_config_survives_json(registry, name):
    config = registry.parse(name)
    assert registry.parse(json.loads(json.dumps(registry.spec(config)))) == config


@fields
def test_whatever_a_field_accepts_survives_json(registry, name, field):
    default = registry.parse(name)
    words = every_arg(registry[name].model_fields[field].annotation)
    accepted = []
    for value in [True, False, 1, 3, 0.125, 0.1, None, [1, 2], *words]:
        with contextlib.suppress(ConfigError):
            accepted.append(registry.parse({"name": name, field: value}))
    for config in accepted:
        assert registry.parse(json.loads(json.dumps(registry.spec(config)))) == config
    assert len(words) == 1 or any(config != default for config in accepted)


def leaves(annotation: Any) -> list[Any]:
    """Return the types of an annotation, and the constraints of those inside it."""
    if isinstance(annotation, FieldInfo):
        return list(annotation.metadata)
    inside = [leaf for arg in get_args(annotation) for leaf in leaves(arg)]
    return [get_origin(annotation) or annotation, *inside]


def every_arg(annotation: Any) -> list[Any]:
    """Return the words of every `Literal` inside an annotation."""
    args = get_args(annotation)
    words = [arg for arg in args if isinstance(arg, str | bool | int)]
    return words + [word for arg in args for word in every_arg(arg)]


@fields
@pytest.mark.parametrize(
    "value", [[], {}, "no such word", float("nan"), float("inf"), b"1", 1j], ids=repr
)
def test_a_value_of_the_wrong_type_is_refused_by_name(registry, name, field, value):
    with pytest.raises(ConfigError, match=rf"{name}.*\b{field}="):
        registry.parse({"name": name, field: value})


@fields
def test_a_value_just_out_of_range_is_refused_by_name(registry, name, field):
    info = registry[name].model_fields[field]
    numbers = {int, float} & set(leaves(info.annotation))
    limits = {
        kind: getattr(constraint, kind)
        for constraint in [*info.metadata, *leaves(info.annotation)]
        for kind in ("ge", "gt", "le", "lt")
        if isinstance(getattr(constraint, kind, None), int | float)
    }
    assert bool(numbers) == bool(limits)
    if list in leaves(info.annotation):
        return  # the limits are those of its items
    step = 1 if int in numbers else 1e-6
    outside = {"ge": -step, "gt": 0, "le": step, "lt": 0}
    for kind, limit in limits.items():
        with pytest.raises(ConfigError, match=rf"{name}.*\b{field}="):
            registry.parse({"name": name, field: limit + outside[kind]})


@entries
def test_an_unknown_field_is_refused_and_the_known_ones_are_named(registry, name):
    with pytest.raises(ConfigError, match=r"unknown field 'no_such_field'; one of \[") as caught:
        registry.parse({"name": name, "no_such_field": 1})
    for field in registry[name].model_fields:
        assert repr(field) in str(caught.value)


@entries
def test_an_entry_names_its_source(registry, name):
    doc = sys.modules[registry[name].__module__].__doc__ or ""
    assert "Source: " in doc
    assert inspect.getdoc(registry[name])


@entries
def test_every_field_is_documented(registry, name):
    described = "\n".join(inspect.getdoc(cls) or "" for cls in registry[name].__mro__)
    for field in registry[name].model_fields:
        assert f"    {field}: " in described
