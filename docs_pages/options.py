"""The options of a component's config as a table: name, type, default, meaning.

Types and defaults come from the pydantic fields, meanings from the `Attributes` of the docstring.
"""

import inspect
import types
from collections.abc import Iterable, Iterator
from typing import Any, Literal, Union, get_args, get_origin

from griffe import Docstring, DocstringSectionKind
from pydantic.fields import FieldInfo

from docs_pages.markdown import cell, linked
from moeadapt.errors import ConfigError
from moeadapt.registry import ComponentConfig

Config = type[ComponentConfig]


def own_options(cls: Config) -> list[str]:
    """Name the options that `cls` itself declares."""
    return [name for name in inspect.get_annotations(cls) if name in cls.model_fields]


def prose_of(doc: str | None) -> list[str]:
    """Return the paragraphs of a docstring that belong to no section, the first line left out."""
    sections = Docstring(inspect.cleandoc(doc or "")).parse("google")
    texts = [s.value for s in sections if s.kind is DocstringSectionKind.text]
    return [text for text in "\n\n".join(texts).split("\n\n")[1:] if text]


def table(cls: Config, names: Iterable[str]) -> Iterator[str]:
    """Return the rows of a table of the options called `names`.

    Raises:
        ConfigError: an option is described nowhere.
    """
    yield "| option | type | default | meaning |"
    yield "| --- | --- | --- | --- |"
    for name in names:
        field = cls.model_fields[name]
        default = "required" if field.is_required() else f"`{field.default!r}`"
        meaning = linked(_meaning(cls, name))
        yield f"| `{name}` | {cell(_type_words(field.annotation))} | {default} | {cell(meaning)} |"


def _meaning(cls: Config, name: str) -> str:
    for parent in cls.__mro__:
        found = _attributes(parent.__dict__.get("__doc__")).get(name)
        if found is not None:
            return found
    raise ConfigError(f"option {name!r} of {cls.__module__}.{cls.__name__} is described nowhere")


def _attributes(doc: str | None) -> dict[str, str]:
    sections = Docstring(inspect.cleandoc(doc or "")).parse("google", warnings=False)
    return {
        attribute.name: " ".join(attribute.description.split())
        for section in sections
        if section.kind is DocstringSectionKind.attributes
        for attribute in section.value
    }


def _type_words(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Literal:
        return " or ".join(f"`{value!r}`" for value in get_args(annotation))
    if origin in (Union, types.UnionType):
        return " or ".join(_type_words(part) for part in get_args(annotation))
    if annotation is type(None):
        return "`None`"
    if origin is list:
        return f"list of {_type_words(get_args(annotation)[0])}"
    if isinstance(annotation, FieldInfo) or hasattr(annotation, "__metadata__"):
        return _type_words(get_args(annotation)[0])
    return f"`{annotation.__name__}`"
