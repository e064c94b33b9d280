"""docs/methods.md is what the docstrings say, and an entry without line or source is refused."""

from pathlib import Path
from types import ModuleType

import pytest

from docs_pages.__main__ import pages as generated_pages
from docs_pages.families import FAMILIES
from docs_pages.options import own_options, table
from docs_pages.papers import split_source
from moeadapt import BALANCE, EXPERTS, PRESETS, ROUTERS, catalogue
from moeadapt.errors import ConfigError
from moeadapt.export.targets import EXPORTERS
from moeadapt.presets import Preset
from moeadapt.registry import ComponentConfig
from moeadapt.routers.base import RouterConfig

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "methods.md"


def test_the_committed_page_is_up_to_date():
    assert PAGE.read_text() == catalogue.markdown(), "run `make docs`"


GENERATED = generated_pages()


@pytest.mark.parametrize("name", sorted(GENERATED))
def test_a_generated_page_is_up_to_date(name):
    assert (DOCS / name).read_text() == GENERATED[name], "run `make docs`"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.kind)
def test_a_family_page_has_every_entry_with_every_option(family):
    sections = GENERATED[f"families/{family.page}"].split("\n## ")
    for name, cls in family.registry.items():
        (section,) = [text for text in sections if text.startswith(f"`{name}`")]
        assert "**Source.**" in section
        common = own_options(family.common) if family.common else []
        for option in cls.model_fields:
            if option not in common:
                assert f"| `{option}` |" in section


def test_presets_and_exporters_have_a_section_each():
    for name in PRESETS:
        assert f"\n## `{name}`\n" in GENERATED["families/presets.md"]
    for name in EXPORTERS:
        assert f"\n## `{name}`\n" in GENERATED["families/exporters.md"]


def test_an_option_that_is_described_nowhere_is_refused():
    class Undescribed(ComponentConfig):
        """A line."""

        width: int = 3

    with pytest.raises(ConfigError, match="option 'width' of .*Undescribed is described nowhere"):
        list(table(Undescribed, ["width"]))


@pytest.mark.parametrize(
    ("source", "cut"),
    [
        ("A et al. 2020, https://x.org/1, eq. 2-3. We differ.", "We differ."),
        ("A 2020, https://x.org/1 (see b. and c. there). More. Still more.", "More. Still more."),
        ('A 1991, "Title", eq. 1.3', ""),
        ("ours alone", ""),
    ],
)
def test_the_paper_index_cuts_a_source_after_its_citations(source, cut):
    assert split_source(source)[1] == cut


def test_every_entry_has_a_row():
    rows = {line.split("|")[1].strip() for line in PAGE.read_text().splitlines() if "|" in line}
    for registry in (ROUTERS, BALANCE, EXPERTS, PRESETS):
        assert {f"`{name}`" for name in registry} <= rows


@pytest.mark.parametrize(
    ("doc", "module_doc", "message"),
    [
        (None, "Source: a paper.", "router 'x' lacks a first docstring line"),
        ("A router.", "No origin.", "router 'x' lacks a 'Source:' paragraph"),
        ("A router.", None, "router 'x' lacks a 'Source:' paragraph"),
    ],
)
def test_an_entry_without_line_or_source_is_refused(doc, module_doc, message, monkeypatch):
    module = ModuleType("made_up", module_doc)
    monkeypatch.setitem(catalogue.sys.modules, "made_up", module)
    cls = type("XConfig", (RouterConfig,), {"__doc__": doc, "__module__": "made_up"})
    with pytest.raises(ConfigError, match=f"{message}; add it in made_up"):
        catalogue.describe("router", "x", cls)


@pytest.mark.parametrize(("line", "source"), [("", "a paper"), ("A method.", "")])
def test_a_preset_without_line_or_source_is_refused(line, source):
    with pytest.raises(ConfigError, match="preset 'x' lacks .*presets.py"):
        catalogue.describe("preset", "x", Preset(line=line, source=source))


def test_a_source_may_span_lines_and_ends_with_its_paragraph(monkeypatch):
    doc = "One.\n\nSource: A et al. 2020,\nhttps://example.org/1, eq. 2.\n\nMore.\n"
    monkeypatch.setitem(catalogue.sys.modules, "made_up", ModuleType("made_up", doc))
    cls = type("XConfig", (RouterConfig,), {"__doc__": "A router.\n", "__module__": "made_up"})
    method = catalogue.describe("router", "x", cls)
    assert method.source == "A et al. 2020, https://example.org/1, eq. 2."
    assert (method.line, method.url) == ("A router.", "https://example.org/1")
