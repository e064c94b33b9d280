"""Builds the wheel from a copy of the sources, and hides what a plain install would not bring."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "setup.py", "MANIFEST.in")

HIDE = '''
import sys


class Installed:
    """Stands in for the finder of installed packages, and finds only those of a plain install."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            return None
        return self.finder.find_spec(name, path, target)

    def find_distributions(self, *args, **kwargs):
        for found in self.finder.find_distributions(*args, **kwargs):
            if found.name not in HIDDEN_DISTRIBUTIONS:
                yield found

    def invalidate_caches(self):
        self.finder.invalidate_caches()


sys.meta_path[:] = [Installed(f) if hasattr(f, "find_distributions") else f for f in sys.meta_path]
'''


def project() -> dict[str, Any]:
    """Return the `project` table of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def build_wheel(folder: Path) -> Path:
    """Build source archive and wheel in `folder`, from a copy; return the wheel.

    The copy keeps `build/` and egg-info, where files of older builds wait, out of the wheel.
    """
    copy = folder / "sources"
    leave = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "moeadapt", copy / "moeadapt", ignore=leave)
    shutil.copytree(ROOT / "configs", copy / "configs")
    for name in SOURCES:
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = folder.glob("*.whl")
    return wheel


def unpack(wheel: Path, folder: Path) -> Path:
    """Install the wheel's files into `folder`, which goes on PYTHONPATH."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def plain_install() -> set[str]:
    """Return the distributions that `pip install moeadapt` brings, by normalised name."""
    found: set[str] = set()
    waiting = [(Requirement(line), "") for line in project()["dependencies"]]
    while waiting:
        need, extra = waiting.pop()
        if need.marker and not need.marker.evaluate({"extra": extra}):
            continue
        name = _normal(need.name)
        if name not in found:
            found.add(name)
            lines = metadata.requires(need.name) or []
            waiting += [(Requirement(line), e) for line in lines for e in ("", *need.extras)]
    return found


def hide_the_rest() -> str:
    """Return Python code after which only a plain install of moeadapt can be imported."""
    kept = plain_install() | {"moeadapt"}
    hidden, distributions = set(), set()
    for module, owners in metadata.packages_distributions().items():
        if not any(_normal(owner) in kept for owner in owners):
            hidden.add(module)
            distributions.update(owners)
    return f"HIDDEN = {hidden!r}\nHIDDEN_DISTRIBUTIONS = {distributions!r}\n{HIDE}"


def _normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")
