"""Words and tables in Markdown that say what they are given, whatever signs are in it."""

import re
from collections.abc import Iterable, Sequence

_SIGNS = re.compile(r"([\\`*_\[\]<>#|])")


def text(value: object) -> str:
    """Return plain text on one line: no sign of it is read as Markdown or HTML."""
    return _SIGNS.sub(r"\\\1", " ".join(str(value).split()))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table; what is in it is plain text."""
    lines = [columns, ["---"] * len(columns)]
    body = [[text(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [*lines, *body])


def code(language: str, *lines: str) -> str:
    """Return a block of code."""
    return "\n".join([f"```{language}", *lines, "```"])
