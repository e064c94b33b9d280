"""The model card: our part between two marks, everything else as its owner wrote it."""

import re
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from moeadapt.errors import ConfigError
from moeadapt.model_card.templates import is_template

MARK = "<!-- moeadapt:begin"
"""How `BEGIN` begins, whatever a version says after it."""

BEGIN = f"{MARK}: `moeadapt push` replaces what is between these two marks -->"
END = "<!-- moeadapt:end -->"
_BEGIN = re.compile(rf"{MARK}\b[^>]*-->")

OURS = ("library_name", "base_model", "base_model_relation")
"""Fields that say what the files are: ours, whatever stood there."""

UNITED = ("tags", "datasets")
"""Lists that keep the owner's entries."""


def make_card(
    fields: dict[str, Any], part: str, old: str | None, where: str, *, keep_draft: bool = False
) -> str:
    """Return the text of README.md.

    Args:
        fields: the front matter that we write; None: left out.
        part: our part, Markdown.
        old: the README.md that is there; None: none.
        where: it is, named in messages.
        keep_draft: keep the text of a draft that a library made, too.

    Raises:
        ConfigError: the old front matter is no YAML mapping, or the marks are broken.
    """
    block = f"{BEGIN}\n{part.strip()}\n{END}"
    card = read_card(old, where)
    card.data = ModelCardData(**_fields(fields, card.data.to_dict()))
    card.text = _text(block, card.text, where, keep_draft)
    return _with_final_newline(str(card))


def read_card(old: str | None, where: str) -> ModelCard:
    """Return the card that is there, or an empty one.

    Raises:
        ConfigError: see `make_card`.
    """
    # The library warns of a card without front matter; an empty one says the same.
    text = old.lstrip("\ufeff").replace("\r\n", "\n") if old else ""
    if not text.lstrip().startswith("---"):
        text = f"---\n{{}}\n---\n{text}"
    try:
        return ModelCard(text)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        reason = str(error).replace("\n", " ")
        raise ConfigError(
            f"{where}: its front matter (between the two ---) is not what a hub reads: "
            f"{reason}; mend it there"
        ) from None


def own_text(old: str | None) -> str:
    """Return what the owner wrote: without front matter, our part, and untouched templates."""
    if not old:
        return ""
    text = read_card(old, "README.md").text
    match = _BEGIN.search(text)
    if match and END in text:
        text = text[: match.start()] + text[text.index(END) + len(END) :]
    return "" if is_template(text) else text


def _fields(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    fields = dict(theirs)
    for name, value in ours.items():
        if value is None:
            continue
        if name in UNITED:
            before = fields.get(name) or []
            before = [before] if isinstance(before, str) else list(before)
            fields[name] = list(dict.fromkeys([*_kept(name, before), *value]))
        elif name in OURS or not fields.get(name):
            fields[name] = value
    return fields


def _kept(name: str, values: list[Any]) -> list[Any]:
    """Return the owner's entries; of PEFT's tags about a base, ours replace the older ones."""
    if name != "tags":
        return values
    return [value for value in values if not str(value).startswith("base_model:")]


def _text(block: str, text: str, where: str, keep_draft: bool) -> str:
    begins = list(_BEGIN.finditer(text))
    ends = [match.start() for match in re.finditer(re.escape(END), text)]
    if not begins and not ends:
        own = "" if is_template(text) and not keep_draft else text.strip("\n")
        return f"\n{block}\n" + (f"\n{own}\n" if own else "")
    if len(begins) != 1 or len(ends) != 1 or ends[0] < begins[0].end():
        raise ConfigError(
            f"{where}: holds {len(begins)} marks {MARK} ... --> and {len(ends)} marks "
            f"{END}; leave one of each, in this order, or none"
        )
    before, after = text[: begins[0].start()], text[ends[0] + len(END) :]
    if is_template(before + after) and not keep_draft:
        return f"\n{block}\n"
    return before + block + after


def _with_final_newline(text: str) -> str:
    return text if text.endswith("\n") else text + "\n"
