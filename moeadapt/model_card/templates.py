"""Tells a card that a library generated and nobody touched from one that somebody wrote."""

import re
from functools import cache
from pathlib import Path

_GENERATED = (
    r"# Model Card for Model ID",
    r"- PEFT [\w.]+",
    r"### Framework versions",
    r"## Training procedure",
    r"- \*\*(License|Language\(s\) \(NLP\)|Finetuned from model \[optional\]):\*\* [\w./-]+",
    r"This is the model card of a .{1,3} \w+ model that has been pushed on the Hub\. "
    r"This model card has been automatically generated\.",
)


def is_template(text: str) -> bool:
    """Whether every line of a card's text is one of PEFT's or transformers' empty template.

    Example:
        >>> is_template("# Model Card for Model ID"), is_template("# My model")
        (True, False)
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return bool(lines) and all(line in _known() or _is_generated(line) for line in lines)


def _is_generated(line: str) -> bool:
    return any(re.fullmatch(pattern, line) for pattern in _GENERATED)


@cache
def _known() -> frozenset[str]:
    """Return the lines of the template of huggingface_hub, its blanks filled with its own words."""
    import huggingface_hub

    place = Path(huggingface_hub.__file__).parent / "templates" / "modelcard_template.md"
    text = place.read_text(encoding="utf-8").partition("{{ card_data }}\n---")[2]
    filled = re.sub(r"\{\{[^}]*default\(\s*\"([^\"]*)\"[^}]*\}\}", r"\1", text)
    return frozenset(line.strip() for line in filled.splitlines() if line.strip())
