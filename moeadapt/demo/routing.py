"""Writes the routing report of the demo's better mixture, on held-out rows."""

from pathlib import Path
from typing import Any

from rich.console import Console

from moeadapt.demo.arms import Arm
from moeadapt.report.report import report

TEXTS = 8
"""Held-out texts of each task."""

MAX_LENGTH = 96
"""Tokens of a text; the rest is cut, since each text is read in nine ways."""


def write_report(
    console: Console, arm: Arm, model: Any, tokenizer: Any, test: list[dict[str, str]], out: Path
) -> dict[str, Any]:
    """Measure and draw; returns where the page lies, its bytes, the seconds, and the answers."""
    texts: dict[str, list[str]] = {}
    for row in test:
        own = texts.setdefault(row["domain"], [])
        if len(own) < TEXTS:
            own.append(row["prompt"] + "\n" + row["completion"])
    page = out / "report" / "report.html"
    console.print(f"{arm.name}: measuring its routing on {TEXTS} held-out texts of each task")
    found = report(
        model,
        tokenizer,
        texts,
        page,
        max_length=MAX_LENGTH,
        training_log=out / arm.folder,
        title=arm.name,
    )
    for tile in found.data.verdicts:
        console.print(f"  {tile.name}: {tile.answer}")
    size = page.stat().st_size
    console.print(
        f"routing report: {page} ({size / 1e3:.0f} kB, {found.data.seconds:.0f} s), with its "
        "pictures and a JSON file of every number beside it"
    )
    answers = {tile.name: tile.answer for tile in found.data.verdicts}
    return {
        "page": str(page),
        "bytes": size,
        "seconds": found.data.seconds,
        "verdicts": answers,
    }
