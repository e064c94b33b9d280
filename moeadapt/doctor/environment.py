"""Checks of the environment: Python, packages, extras, the GPU, and PEFT's knowledge of us."""

import re
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from moeadapt.doctor.finding import Finding, Level, Subject

OURS = "moeadapt"


def python_version(subject: Subject) -> Iterator[Finding]:
    """Compare Python with what the installed package supports."""
    del subject
    here = ".".join(str(part) for part in sys.version_info[:3])
    wanted = _metadata().get("Requires-Python") or ""
    if not SpecifierSet(wanted).contains(here, prereleases=True):
        yield Finding(
            check="python",
            level="error",
            what=f"Python {here} is not supported; {OURS} needs Python {wanted}",
            why="it was not tested there, and may not even be parsed",
            cure="make a virtual environment with a supported Python and install moeadapt there",
        )


def packages(subject: Subject) -> Iterator[Finding]:
    """Compare what is needed with what is installed."""
    del subject
    for need in _requirements(None):
        yield from _compare(need, "packages", "error", missing=True)


def extras(subject: Subject) -> Iterator[Finding]:
    """Say which extras are complete; a wrong version of an optional package is a warning."""
    del subject
    for extra in sorted(_metadata().get_all("Provides-Extra") or ()):
        needs = _requirements(extra)
        problems = [f for need in needs for f in _compare(need, "extras", "warning", missing=False)]
        yield from problems
        missing = [need.name for need in needs if _version(need.name) is None]
        if missing:
            yield Finding(
                check="extras",
                level="ok",
                what=f"extra {extra!r} is not installed: no {', '.join(sorted(missing))}",
                cure=f"if you need it: pip install '{OURS}[{extra}]'",
            )
        elif not problems:
            yield Finding(check="extras", level="ok", what=f"extra {extra!r} is installed")


def gpu(subject: Subject) -> Iterator[Finding]:
    """Say what torch computes on."""
    del subject
    import torch

    if not torch.cuda.is_available():
        yield Finding(check="gpu", level="ok", what="no CUDA device: torch computes on the CPU")
        return
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        yield Finding(
            check="gpu",
            level="ok",
            what=f"cuda:{number}: {facts.name}, {facts.total_memory / 2**30:.0f} GiB",
        )


def method(subject: Subject) -> Iterator[Finding]:
    """See whether PEFT knows the method, and loads it through our checks."""
    del subject
    from peft import PeftModel
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from moeadapt.tuner.config import MoeLoraConfig
    from moeadapt.tuner.entry_points import is_installed

    known = PEFT_TYPE_TO_CONFIG_MAPPING.get("MOEADAPT")  # type: ignore[call-overload]
    if known is not MoeLoraConfig:
        yield Finding(
            check="method",
            level="error",
            what=f"PEFT does not know the method MOEADAPT: it has {known}",
            why="adapters can be neither made nor loaded",
            cure="reinstall moeadapt, and import nothing that replaces PEFT's registry",
        )
    if not is_installed():
        yield Finding(
            check="method",
            level="error",
            what=f"something replaced a loading function of PEFT: {PeftModel.from_pretrained!r}",
            why="adapters would be loaded unchecked",
            cure="import moeadapt after the package that patches PEFT, or leave that package out",
        )


def _compare(need: Requirement, check: str, level: Level, missing: bool) -> Iterator[Finding]:
    found = _version(need.name)
    if found is None and not missing:
        return
    if found is not None and need.specifier.contains(found, prereleases=True):
        return
    has = "is not installed" if found is None else f"{found} is installed"
    yield Finding(
        check=check,
        level=level,
        what=f"{need.name}: {has}; {OURS} supports {need.specifier or 'any version'}",
        why="other versions were not tested, and may compute something else",
        cure=f"pip install '{need.name}{need.specifier}'",
    )


def _metadata() -> Any:  # a protocol, which run-time checks cannot look at
    return metadata.metadata(OURS)


def _requirements(extra: str | None) -> list[Requirement]:
    """Return what is needed here: always, or for one extra in addition; ours in ours resolved."""
    found: dict[str, Requirement] = {}
    todo, seen = [extra], set()
    while todo:
        name = todo.pop()
        seen.add(name)
        for need in map(Requirement, metadata.requires(OURS) or ()):
            marker, here = need.marker, {"extra": name or ""}
            if marker is not None and not marker.evaluate(here):
                continue
            if name is not None and (marker is None or marker.evaluate({"extra": ""})):
                continue
            if re.sub(r"[-_.]+", "-", need.name).lower() == OURS:
                todo.extend(e for e in need.extras if e not in seen)
            else:
                found[need.name] = need
    return list(found.values())


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
