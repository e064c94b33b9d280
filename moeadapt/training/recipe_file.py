"""Reads a recipe file as plain data, and remembers the line of every setting.

YAML can do more than a recipe needs. What it can do beyond plain data is refused with its line:
tags that build objects, anchors that multiply themselves, keys that are written twice.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from moeadapt.errors import ConfigError, MoeAdaptError
from moeadapt.recipes import shipped_recipes
from moeadapt.training.places import Path as SettingPath
from moeadapt.training.places import Places

MAX_BYTES = 1 << 20
"""Largest recipe; the shipped ones have under 2 kB."""

MAX_DEPTH = 20
"""Deepest nesting; the shipped recipes have 3 levels."""

_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool")}
_TAGS |= {"tag:yaml.org,2002:null"}


class Loader(yaml.SafeLoader):
    """Safe YAML of plain data alone, without two surprises of YAML 1.1.

    `1e-3` is a number, and `no` is a word.
    """

    _depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        """See `yaml.composer.Composer`; refuses aliases and deep nesting before they cost."""
        mark = self.peek_event().start_mark
        if self.check_event(yaml.AliasEvent):
            raise ComposerError(None, None, "aliases (*name) are not read; write it out", mark)
        if self._depth >= MAX_DEPTH:
            raise ComposerError(None, None, f"nested more than {MAX_DEPTH} levels deep", mark)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def flatten_mapping(self, node: MappingNode) -> None:
        """See `yaml.constructor.SafeConstructor`; nothing is merged, so `<<` is a key like any."""

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        """See `yaml.constructor.BaseConstructor`; plain data or a refusal with its place."""
        if node.tag not in _TAGS:
            raise ConstructorError(
                None, None, f"the tag {node.tag!r} is not read: a recipe is plain data",
                node.start_mark,
            )  # fmt: skip
        try:
            return super().construct_object(node, deep=deep)
        except ValueError:  # an integer of thousands of digits
            problem = f"{str(node.value)[:20]!r}... is no value that a recipe can hold"
            raise ConstructorError(None, None, problem, node.start_mark) from None


_OTHER = ("bool", "timestamp", "merge", "value")
Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in _OTHER]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool",
    re.compile(r"^(true|True|TRUE|false|False|FALSE)$"),
    list("tTfF"),
)
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def parse_value(text: str) -> Any:
    """Return the plain data that `text` is in YAML.

    Raises:
        yaml.YAMLError: it is no YAML, or not of plain data.
    """
    return _parse(text)[0]


def read_recipe(path: str) -> tuple[dict[str, Any], Places]:
    """Return the mapping in a file, and where in it each setting stands.

    Args:
        path: of a YAML file of at most `MAX_BYTES` bytes.

    Raises:
        ConfigError: the file cannot be read, is empty, is no mapping, is no valid YAML, or has a
            key twice, an alias, a tag or too deep a nesting; names file and line.
    """
    text = _read_text(path)
    try:
        values, node = _parse(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        problem = ", ".join(filter(None, [error.context, error.problem]))
        raise ConfigError(f"{path}:{line}: not a recipe: {problem}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{path}:{line}: not a recipe: {error.reason}") from None
    if node is None:
        raise ConfigError(f"{path}:1: the recipe is empty; `moeadapt recipes ls` lists examples")
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}:{node.start_mark.line + 1}: a recipe is a mapping of settings, found a "
            f"{type(values).__name__}"
        )
    lines = {keys: f"{path}:{line}" for keys, line in _lines(node, ())}
    return values, Places(lines, default=path)


def _read_text(path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read the recipe {path}: {reason}{_where_from(path)}") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_BYTES} bytes, which no recipe is")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text: {error.reason}") from None


def _where_from(path: str) -> str:
    """Return what to do about a recipe that is not there."""
    name = path.removesuffix(".yaml").removeprefix("configs/")
    try:
        if Path(path).exists():
            return ""
        shipped = name in shipped_recipes()
    except (OSError, ValueError, MoeAdaptError):  # no path at all; no recipes here
        return ""
    if shipped:
        return f"; `moeadapt recipes cp {name}` copies it from the ones that come with moeadapt"
    return "; `moeadapt recipes ls` lists those that come with moeadapt"


def _parse(text: str) -> tuple[Any, Node | None]:
    loader = Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, None
        _refuse_repeated(node)
        return loader.construct_document(node), node
    finally:
        loader.dispose()


def _refuse_repeated(node: Node) -> None:
    """Refuse a key that is written twice: YAML's parser would silently take the last."""
    if isinstance(node, SequenceNode):
        for item in node.value:
            _refuse_repeated(item)
    if not isinstance(node, MappingNode):
        return
    first: dict[str, int] = {}
    for key, value in node.value:
        if isinstance(key, ScalarNode):
            line = key.start_mark.line + 1
            if key.value in first:
                problem = f"{key.value!r} is set a second time, first in line {first[key.value]}"
                raise ConstructorError(None, None, problem, key.start_mark)
            first[key.value] = line
        _refuse_repeated(value)


def _lines(node: Node, keys: SettingPath) -> Iterator[tuple[SettingPath, int]]:
    """Yield the path of every setting in nested mappings, and its line."""
    if not isinstance(node, MappingNode):
        return
    for key, value in node.value:
        below = (*keys, str(key.value))
        yield below, key.start_mark.line + 1
        yield from _lines(value, below)
