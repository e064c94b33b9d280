"""The paper index: paper, what we implement, settings, where we differ."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from docs_pages.families import FAMILIES, Family, own_names
from docs_pages.markdown import cell, linked, note, settings
from moeadapt import PRESETS, catalogue

PACKAGE = Path(__file__).parents[1] / "moeadapt"

INTRO = """\
What was published, what of it is implemented here, how to switch it on, and where we differ. All
of it stands in the docstrings of the files named and of the entries linked. Where we and a paper
disagree without a word, that is a mistake: please report it. Citations name the section or the
equations that were followed."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the index, cells in Markdown."""

    paper: str
    what: str
    settings: str
    differs: str


def page() -> str:
    """Return docs/papers.md."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield from ["---", "hide:", "  - toc", "---", "", "# Paper index", ""]
    yield from [note("the docstrings and moeadapt/presets.py"), "", INTRO, ""]
    yield from ["## Published methods", ""]
    yield from _table(_preset_rows())
    for family in FAMILIES:
        yield from ["", f"## {catalogue.KINDS[family.kind][0]}", ""]
        yield from _table(_entry_rows(family))
    yield from ["", "## Everything else", "", "| paper | what we do with it | file |"]
    yield "| --- | --- | --- |"
    for file, what, source in _files():
        yield f"| {cell(linked(source))} | {cell(what)} | `{file}` |"


def _table(rows: Iterator[Row]) -> Iterator[str]:
    yield "| paper | what we implement | settings | notes, and where we differ |"
    yield "| --- | --- | --- | --- |"
    for row in rows:
        yield f"| {row.paper} | {row.what} | {row.settings} | {row.differs} |"


def _preset_rows() -> Iterator[Row]:
    for name, preset in sorted(PRESETS.items()):
        yield Row(
            paper=cell(linked(preset.source)),
            what=f"[`{name}`](families/presets.md#{name}): {cell(preset.line)}",
            settings=cell(settings(dict(preset.fields))),
            differs=cell(preset.differs) or "-",
        )


def _entry_rows(family: Family) -> Iterator[Row]:
    for name, entry in sorted(family.registry.items()):
        method = catalogue.describe(family.kind, name, entry)
        paper, more = split_source(method.source)
        options = ", ".join(f"`{option}`" for option in own_names(family, entry)) or "-"
        yield Row(
            paper=cell(linked(paper)),
            what=f"[`{name}`](families/{family.page}#{name}): {cell(method.line)}",
            settings=options,
            differs=cell(linked(more)) or "-",
        )


def split_source(source: str) -> tuple[str, str]:
    """Cut a source into its citations, the first sentence with a link, and what is said of them.

    The stop of `eq.` and `et al.`, and stops in parentheses, end no sentence.
    """
    depth = 0
    for i, letter in enumerate(source):
        depth += (letter == "(") - (letter == ")")
        ends = letter == "." and not depth and source[i + 1 : i + 2] in ("", " ")
        before = source[:i]
        if ends and ("http" in before or '"' in before) and not before.endswith(("eq", " al")):
            return before, source[i + 1 :].strip()
    return source, ""


def _files() -> Iterator[tuple[str, str, str]]:
    """Yield file, purpose and source of every file that is no entry of a registry."""
    entries = {
        cls.__module__.replace(".", "/") + ".py"
        for family in FAMILIES
        for cls in family.registry.values()
    }
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE.parent).as_posix()
        if file in entries:
            continue
        doc = ast.get_docstring(ast.parse(path.read_text())) or ""
        source = catalogue.source_of(doc)
        if "http" in source or re.search(r"\b(19|20)\d\d\b", source):
            yield file, doc.partition("\n")[0], source
