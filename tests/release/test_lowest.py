"""constraints-lowest.txt pins what pyproject.toml allows at least, so that it can be tested."""

import re

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.release.wheel import ROOT, project

NOT_OLDEST = {"torch"}
"""See the first lines of constraints-lowest.txt."""


def pins():
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def bounds():
    table = project()
    lines = [*table["dependencies"], *table["optional-dependencies"]["train"]]
    for need in map(Requirement, lines):
        (least,) = [spec.version for spec in need.specifier if spec.operator == ">="]
        yield need.name, need.specifier, least


@pytest.mark.parametrize(("name", "allowed", "least"), list(bounds()))
def test_a_lower_bound_is_what_the_lowest_environment_has(name, allowed, least):
    pin = pins()[name]
    assert allowed.contains(pin)
    if name not in NOT_OLDEST:
        assert Version(pin).release[: len(Version(least).release)] == Version(least).release
        assert not any(Version(pin).release[len(Version(least).release) :])


def test_what_is_pinned_is_required():
    assert set(pins()) == {name for name, _, _ in bounds()}


def test_the_make_target_runs_files_that_exist():
    text = (ROOT / "Makefile").read_text()
    (line,) = re.findall(r"^LOWEST_TESTS := (.*)$", text, re.MULTILINE)
    for path in line.split():
        assert (ROOT / path).exists(), path
