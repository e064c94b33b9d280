"""Plain English that no arm is trained on: the docstrings of modules of the standard library."""

import ast
import sysconfig
import tokenize
from pathlib import Path

_LEAST, _MOST = 400, 1200
"""Characters."""


def base_text(number: int) -> list[str]:
    """Return `number` texts, the same ones each time on one version of Python."""
    texts = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        with tokenize.open(path) as file:
            text = ast.get_docstring(ast.parse(file.read())) or ""
        if len(text) >= _LEAST:
            texts.append(text[:_MOST])
    if len(texts) < number:
        raise SystemExit(f"only {len(texts)} texts of base text; {number} were asked for")
    # Spread over the alphabet: neighbours are parts of one package.
    return [texts[index * len(texts) // number] for index in range(number)]
