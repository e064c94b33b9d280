"""Calls verbs in this process, and knows every verb there is."""

from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

from moeadapt.cli import app


def call(*args: str | Path, **options: Any) -> Any:
    """Run `moeadapt` with `args`; the result has stdout, stderr and exit_code."""
    return CliRunner().invoke(app, [str(arg) for arg in args], prog_name="moeadapt", **options)


def verbs(group: typer.Typer = app, before: str = "") -> list[str]:
    """Return every verb as it is typed, also those of groups: `train`, `recipes ls`."""
    own = [before + str(command.name) for command in group.registered_commands]
    for inner in group.registered_groups:
        assert inner.typer_instance is not None
        own += verbs(inner.typer_instance, f"{inner.name} ")
    return own
