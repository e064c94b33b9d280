"""One process that dry-runs recipes, with a watch on what it writes and where it connects.

Run as `python -B -m tests.faults.dry_runs REPORT RECIPE...`; writes a JSON report at the end.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "shutil.move")
NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")

events: list[str] = []


class Blocked(Exception):
    """What a socket does in a dry run."""


def watch(event: str, args: tuple[Any, ...]) -> None:
    """Note every write, and stop every connection."""
    if event in NETWORK:
        events.append(f"{event} {args[1:]}")
        raise Blocked(event)
    if event == "open" and isinstance(args[2], int) and args[2] & WRITES:
        events.append(f"open {args[0]}")
    if event in CHANGES:
        events.append(f"{event} {args[0]}")


def main(report: Path, recipes: list[str]) -> None:
    """Dry-run every recipe through the command line."""
    from typer.testing import CliRunner

    # Importing may write caches of its own; what a dry run does comes after it.
    import moeadapt.training.plan  # noqa: F401
    from moeadapt.cli import app
    from moeadapt.embedded import MODELS

    for name, spec in MODELS.items():  # fewer layers are planned sooner
        MODELS[name] = replace(spec, config={**spec.config, "num_hidden_layers": 2})
    cpu = ["--use_cpu", "true", "--bf16", "false", "--fp16", "false"]
    found = {}
    sys.addaudithook(watch)
    for recipe in recipes:
        events.clear()
        args = ["train", Path(recipe).parent.name, "--config", recipe, "--dry-run", *cpu]
        done = CliRunner().invoke(app, args)
        found[recipe] = {
            "code": done.exit_code,
            "output": done.output,
            "error": repr(done.exception),
            "events": [event for event in events if os.devnull not in event],
        }
    report.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
