"""docs/methods.md is what the docstrings say, and an entry without line or source is refused."""

from pathlib import Path
from types import ModuleType

import pytest

from moeadapt import BALANCE, EXPERTS, PRESETS, ROUTERS, catalogue
from moeadapt.errors import ConfigError
from moeadapt.presets import Preset
from moeadapt.routers.base import RouterConfig

PAGE = Path(__file__).parents[1] / "docs/methods.md"


def test_the_committed_page_is_up_to_date():
    assert PAGE.read_text() == catalogue.markdown(), "run `make docs`"


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
