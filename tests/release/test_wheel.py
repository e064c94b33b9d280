"""The wheel holds the package and nothing else, and its version comes from one place."""

import re
import zipfile
from email.parser import Parser
from importlib.metadata import requires

import pytest

from moeadapt.version import __version__
from tests.release.wheel import ROOT, build_wheel

KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
LARGEST = 2_000_000
"""Bytes of a wheel that is code and templates; data that slips in would be more."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_file_of_the_package(names):
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "moeadapt").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    missing = package - names
    assert not missing, f"not in pyproject.toml's package-data: {sorted(missing)}"
    assert "moeadapt/py.typed" in names
    assert any(name.startswith("moeadapt/report/templates/") for name in names)


def test_the_wheel_holds_every_recipe(names):
    recipes = {p.relative_to(ROOT).as_posix() for p in (ROOT / "configs").glob("*/*.yaml")}
    assert recipes
    held = {name.removeprefix("moeadapt/") for name in names if name.startswith("moeadapt/configs")}
    # How to start several processes belongs to a checkout's scripts, and is a recipe of accelerate.
    assert held == recipes


def test_the_wheel_holds_nothing_else(names):
    others = {name for name in names if not name.startswith("moeadapt/")}
    folder = f"moeadapt-{__version__}.dist-info"
    wanted = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt")
    assert others == {f"{folder}/{name}" for name in (*wanted, "licenses/LICENSE")}
    assert not [name for name in names if "test" in name.lower().split("/")]


def test_the_wheel_is_small(wheel):
    assert wheel.stat().st_size < LARGEST


def test_the_metadata_say_version_license_and_readme(wheel):
    with zipfile.ZipFile(wheel) as archive:
        data = archive.read(f"moeadapt-{__version__}.dist-info/METADATA").decode()
        entry_points = archive.read(f"moeadapt-{__version__}.dist-info/entry_points.txt").decode()
    fields = Parser().parsestr(data)
    assert fields["Version"] == __version__
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["Description-Content-Type"] == "text/markdown"
    assert "moeadapt = moeadapt.cli:main" in entry_points
    assert fields.get_all("Requires-Dist")
    assert requires("moeadapt")


def test_the_changelog_is_kept_and_begins_with_this_version():
    lines = (ROOT / "CHANGELOG.md").read_text().splitlines()
    versions = [line for line in lines if line.startswith("## ")]
    for line in versions:
        assert re.fullmatch(r"## \[\d+\.\d+\.\d+\] - (\d{4}-\d\d-\d\d|Unreleased)", line), line
    assert versions[0].startswith(f"## [{__version__}] - ")
    kinds = [line.removeprefix("### ") for line in lines if line.startswith("### ")]
    assert kinds
    assert set(kinds) <= KINDS


def test_the_version_is_written_in_one_place():
    text = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in text
    assert 'version = { attr = "moeadapt.version.__version__" }' in text
    found = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "moeadapt").rglob("*.py")
        if re.search(r"^__version__ =", path.read_text(), re.MULTILINE)
    ]
    assert found == ["moeadapt/version.py"]
