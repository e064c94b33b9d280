"""Small pieces of Markdown that several generated pages share."""

import re

LINK = re.compile(r"https?://[^\s,;)]*[^\s,;).:]")
"""A link in a docstring, without the punctuation of the sentence around it."""


def note(where: str) -> str:
    """Return the comment that says where to edit instead of in the page."""
    return f"<!-- Written by `make docs`; edit {where} instead. -->"


def linked(text: str) -> str:
    """Make links of the addresses in `text`; an arXiv address is shown as its number."""
    return LINK.sub(lambda found: f"[{_short(found.group())}]({found.group()})", text)


def _short(url: str) -> str:
    number = re.fullmatch(r"https://arxiv\.org/abs/(\S+)", url)
    return f"arXiv {number.group(1)}" if number else url.partition("://")[2]


def cell(text: str) -> str:
    """Return `text` as a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def settings(fields: dict) -> str:
    """Return fields as code, for a table cell."""
    return ", ".join(f"`{name}={value!r}`" for name, value in fields.items())
