"""What there is to choose from: every router, balance loss, expert type and preset, with sources.

Nothing is written twice: the line is the first one of the config class's docstring, the source is
the `Source:` paragraph of the file it lives in.
"""

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from moeadapt.balance import BALANCE
from moeadapt.errors import ConfigError
from moeadapt.experts import EXPERTS
from moeadapt.presets import PRESETS
from moeadapt.routers import ROUTERS

KINDS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "router": ("Routers", ROUTERS),
    "balance": ("Balance losses and regularisers", BALANCE),
    "experts": ("Experts", EXPERTS),
    "preset": ("Presets", PRESETS),
}
"""Kind -> its heading and its registry."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One entry of a registry.

    Attributes:
        kind: one of `KINDS`.
        name: what a config calls it.
        line: what it is.
        source: where it was published, in words.
        url: the first link of the source; None where there is none, as for a plain baseline.
        differs: what of the source is not expressed; only presets say so.
    """

    kind: str
    name: str
    line: str
    source: str
    url: str | None
    differs: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON data."""
        return asdict(self)


def methods() -> list[Method]:
    """Collect every entry, kind by kind, names in order.

    Raises:
        ConfigError: an entry lacks its line or its source; names it and where to add that.
    """
    return [
        describe(kind, name, entry)
        for kind, (_, registry) in KINDS.items()
        for name, entry in sorted(registry.items())
    ]


def describe(kind: str, name: str, entry: Any) -> Method:
    """Collect the line and the source of one entry.

    Raises:
        ConfigError: one of them is missing.
    """
    if kind == "preset":
        line, source, where = entry.line, entry.source, "moeadapt/presets.py"
        differs = entry.differs
    else:
        # Not inspect.getdoc: a class without a docstring must not inherit one.
        line = _first_line(entry.__dict__.get("__doc__"))
        where = entry.__module__
        source = source_of(sys.modules[where].__doc__)
        differs = ""
    for what, text in (("a first docstring line", line), ("a 'Source:' paragraph", source)):
        if not text:
            raise ConfigError(f"{kind} {name!r} lacks {what}; add it in {where}")
    link = _LINK.search(source)
    url = link.group() if link else None
    return Method(kind=kind, name=name, line=line, source=source, url=url, differs=differs)


# Ends before the punctuation of the sentence around it.
_LINK = re.compile(r"https?://[^\s,;)]*[^\s,;).:]")


def _first_line(doc: str | None) -> str:
    return inspect.cleandoc(doc or "").partition("\n")[0]


def source_of(doc: str | None) -> str:
    """Return the `Source:` paragraph of a module's docstring on one line; empty if it has none."""
    found = re.search(r"^Source: (.+?)(?:\n\n|\Z)", inspect.cleandoc(doc or ""), re.DOTALL | re.M)
    return " ".join(found.group(1).split()) if found else ""


def markdown() -> str:
    """Return docs/methods.md."""
    return "\n".join(_pages()) + "\n"


def _pages() -> Iterator[str]:
    found = methods()
    yield "# Methods"
    yield ""
    yield "<!-- Written by `make docs`; edit the docstrings and moeadapt/presets.py instead. -->"
    yield ""
    yield "The names that `MoeLoraConfig` and recipes understand; `moeadapt methods` prints them."
    for kind, (title, _) in KINDS.items():
        yield from ["", f"## {title}", ""]
        if kind == "preset":
            yield "`MoeLoraConfig.preset(name, **overrides)`, or `moe: {preset: name}` in a recipe."
            yield ""
        yield "| name | what it is | source |"
        yield "| --- | --- | --- |"
        for method in found:
            if method.kind == kind:
                yield _row(method)
    yield from ["", "## What the presets set", ""]
    for method in found:
        if method.kind == "preset":
            yield f"- `{method.name}`: {_settings(PRESETS[method.name].fields)}." + (
                f" {method.differs}" if method.differs else ""
            )


def _row(method: Method) -> str:
    cells = [f"`{method.name}`", method.line, _LINK.sub(r"<\g<0>>", method.source)]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _settings(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}={value!r}`" for name, value in fields.items())
