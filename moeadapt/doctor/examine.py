"""Runs the checks that apply, and turns what they raise and warn of into findings."""

import os
import warnings
from collections.abc import Collection
from importlib import metadata
from pathlib import Path

from moeadapt.adapter_format.settings import SETTINGS
from moeadapt.doctor.checks import CHECKS
from moeadapt.doctor.finding import Check, Finding, Subject
from moeadapt.errors import ConfigError, MoeAdaptError


def examine(
    folder: str | Path | None = None,
    base: str | None = None,
    only: Collection[str] | None = None,
) -> list[Finding]:
    """Check the environment and, if given, a folder and its fit to a base.

    Args:
        folder: an adapter, a checkpoint, or the output of a training run.
        base: a base model, loaded to compare it with the one the adapter was trained on.
        only: names of `CHECKS`; None: all that apply.

    Raises:
        ConfigError: `folder` is no folder, or `base` is given without one.

    Example:
        >>> [f.what for f in examine("adapters/math") if f.level == "error"]
        []
    """
    if folder is None and base is not None:
        raise ConfigError("--base is compared with an adapter; give its folder, too")
    if folder is not None and not Path(folder).is_dir():
        raise ConfigError(f"{folder} is no folder; give one with an adapter or a training run")
    subject = Subject(folder=None if folder is None else Path(folder), base=base)
    found: list[Finding] = []
    for name, check in CHECKS.items():
        if (only is None or name in only) and _applies(check, subject):
            new = _run(name, check, subject)
            found.extend(new or [Finding(check=name, level="ok", what=check.line)])
            if check.scope == "adapter" and any(f.level == "error" for f in new):
                subject.facts["failed"] = True
    if only is None and base is None and _has_adapter(subject):
        found.append(Finding(check="fits", level="ok", what=_NO_BASE))
    return found


_NO_BASE = (
    "not checked: names and shapes of the tensors, and which base it belongs to; that takes "
    "--base MODEL"
)


def _has_adapter(subject: Subject) -> bool:
    return subject.folder is not None and os.path.lexists(subject.folder / SETTINGS)


def _applies(check: Check, subject: Subject) -> bool:
    has_adapter = _has_adapter(subject)
    return {
        "environment": True,
        "folder": subject.folder is not None,
        "adapter": has_adapter,
        "base": has_adapter and subject.base is not None,
    }[check.scope]


def _not_looked_at(name: str, check: Check, error: Exception) -> Finding:
    return Finding(
        check=name,
        level="error",
        what=f"could not be looked at: {type(error).__name__}: {error}",
        why=f"it is not known whether {check.line}",
        cure="do not use it before that is known; a file that no reader foresees is damaged or "
        "hostile. Please report this",
    )


def _run(name: str, check: Check, subject: Subject) -> list[Finding]:
    found: list[Finding] = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found.extend(check.run(subject))
        except (MoeAdaptError, OSError, metadata.PackageNotFoundError) as error:
            found.append(Finding(check=name, level="error", what=str(error), why=check.why))
        except Exception as error:  # what a hostile file makes a reader raise hides no other check
            found.append(_not_looked_at(name, check, error))
    # What other packages say of their own future is not about the folder.
    told = [w.message for w in said if w.category is UserWarning and check.scope != "environment"]
    for what in dict.fromkeys(str(message) for message in told):
        found.append(Finding(check=name, level="warning", what=what, why="loading warns of it"))
    return found
