"""The documentation site: every page is reached, every name described, nothing fetched."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import moeadapt
from moeadapt import evaluation, interpret, training
from moeadapt.export import surgery

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
DESCRIBED = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))


def places(name: str, where: str) -> set[str]:
    """Return the ways in which an API page may ask for a public name."""
    return {f"{where}.{name}", f"moeadapt.{name}", f"{where}.{name}.{name}.{name}"}


@pytest.mark.parametrize("module", [moeadapt, training, evaluation, interpret], ids=str)
def test_every_public_name_is_on_an_api_page(module):
    asked = set(re.findall(r"^::: (\S+)", DESCRIBED, re.MULTILINE))
    for name in module.__all__:
        if module is moeadapt and (name.isupper() or name in PACKAGES):
            assert f"`moeadapt.{name}`" in DESCRIBED
        elif name != "__version__":
            assert asked & places(name, module.__name__), name


PACKAGES = {"errors", "evaluation", "interpret", "surgery"}
"""Public names that are modules: their own names are described, not they."""


def test_every_edit_of_experts_is_on_an_api_page():
    for name in ("drop_experts", "merge_experts", "add_experts", "reorder_experts"):
        assert callable(getattr(surgery, name))
        assert f"::: moeadapt.export.surgery.{name}\n" in DESCRIBED


def leaves(nav) -> list[str]:
    """Return the pages of a navigation, in order."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in leaves(part)]


def test_every_page_is_in_the_navigation_once():
    text = re.sub(r"!relative [^\s\]]+", "here", (ROOT / "mkdocs.yml").read_text())
    found = leaves(yaml.safe_load(text)["nav"])
    assert sorted(found) == sorted(p.relative_to(DOCS).as_posix() for p in DOCS.rglob("*.md"))


def test_numbers_that_are_quoted_stand_in_the_evidence():
    quoted = re.findall(r"^\| (?:mixture|plain LoRA),.*$", (DOCS / "choosing.md").read_text(), re.M)
    assert len(quoted) == 3
    assert set(quoted) <= set((DOCS / "evidence.md").read_text().splitlines())


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Build the site as `make docs` does, and return its folder."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return folder


def test_no_page_fetches_anything_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) >= len(list(DOCS.rglob("*.md")))
    for page in pages:
        text = page.read_text()
        assert not re.findall(r'\bsrc="(?:https?:)?//[^"]*"', text), page
        for tag in re.findall(r"<link\b[^>]*>", text):
            assert not re.search(r'href="(?:https?:)?//', tag), (page, tag)
    for style in site.rglob("*.css"):
        assert not re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//", style.read_text()), style


@pytest.mark.browser
def test_the_search_works_from_disk(site):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    address = f"{(site / 'index.html').as_uri()}?q=sparsegen"
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=6000"]
    done = subprocess.run([chromium, *flags, "--dump-dom", address], capture_output=True, text=True)
    assert re.search(r"\d+ matching documents", done.stdout)
    assert "families/routers.html?h=sparsegen#sparsegen" in done.stdout


def test_included_documents_are_there_in_full(site):
    assert "Add a router" in (site / "CONTRIBUTING.html").read_text()
    assert "What we do not promise" in (site / "SECURITY.html").read_text()


def test_examples_of_docstrings_are_shown_as_code(site):
    page = (site / "api/measure.html").read_text()
    assert "Examples:" in page
    assert "<p>&gt;&gt;&gt;" not in page
