"""Finds what must not leave this machine in files that are about to be sent: tokens and paths."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from moeadapt.errors import ConfigError

_SECRETS = {
    "a token of the hub": r"(?<![\w-])(?:hf|api_org)_[A-Za-z0-9]{30,}",
    "a token of GitHub": r"(?<![\w-])(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{22,})",
    "an API key": r"(?<![\w-])(?:sk-[A-Za-z0-9_-]{20,}|AKIA[0-9A-Z]{16}|xox[abpr]-[\w-]{10,})",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    # A name in braces, as in ${TOKEN}, stands for a password and is none.
    "a password in an address": r"[A-Za-z][\w+.-]*://[^\s/:@\"'<>]*:[^\s/@\"'<>{}$]+@[\w\[]",
}

_TOP = (
    "home|Users|root|tmp|private|mnt|media|scratch|workspace|work|data|opt|srv|var|nfs|gpfs|lustre"
)
_PATHS = (
    rf"(?<![\w/.:~-])/(?:{_TOP})/[\w.@+-][^\s\"'`<>)\]]*",
    r"(?<![\w])[A-Za-z]:\\+\w[^\s\"'`<>)\]]*",
    r"file:///[^\s\"'`<>)\]]+",
)
_IN_DATA = r"(?<=[\"'\s\[{(,])/[\w.@+-]+(?:/[\w.@+ -]+)+(?=[\"'\s\]}),]|$)"
"""Any absolute path that is the whole value of a field, or one of a list."""

DATA = (".json", ".yaml", ".yml")

VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")
"""Hold words of all kinds, among them the names of folders of Unix."""


_BASE_FIELDS = ("base_model", "base_model_name_or_path", "model_name_or_path", "_?name_or_path")
"""Fields of settings, recipes, tokenizers and cards that name a base."""


def check_private(name: str, content: bytes, token: str | None = None) -> None:
    """Refuse a text file that holds a token or a path of this machine.

    Args:
        name: in the repository, named in messages.
        content: the file.
        token: the one that is used to push.

    Raises:
        ConfigError: names file, line and kind; a secret is not repeated.
    """
    text = content.decode("utf-8", errors="replace")
    for kind, at in _find_secrets(text, token):
        raise ConfigError(
            f"{name}:{_line(text, at)}: holds {kind}; nothing was sent. Remove it from the file, "
            "and revoke it if others could have read it"
        )
    found = _find_path(name, text)
    if found is not None:
        raise ConfigError(
            f"{name}:{_line(text, found.start())}: holds the path {found[0][:200]!r} of this "
            "machine; nothing was sent. Put the id of the hub there, or remove it"
        )


def _find_secrets(text: str, token: str | None) -> Iterator[tuple[str, int]]:
    if token and (at := text.find(token)) >= 0:
        yield "the token that you push with", at
    for kind, pattern in _SECRETS.items():
        if (found := re.search(pattern, text)) is not None:
            yield kind, found.start()


def _find_path(name: str, text: str) -> re.Match[str] | None:
    home = os.path.expanduser("~")
    patterns = [rf"{re.escape(home)}(?![\w-])"] if len(Path(home).parts) > 2 else []  # noqa: PLR2004
    base = name.rpartition("/")[2]
    if base not in VOCABULARIES:
        patterns += _PATHS
        if base.endswith(DATA):
            patterns.append(_IN_DATA)
    hits = [found for pattern in patterns if (found := re.search(pattern, text, re.MULTILINE))]
    return min(hits, key=lambda found: found.start(), default=None)


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def with_base(text: str, place: str | None, base_model: str) -> str:
    """Return `text` with the base's id where it names the base's place on this machine.

    A name without a separator, as `model`, may be any word: it is looked for only as the value of
    a field that names a base.

    Args:
        text: of a file that is sent; the file itself stays as it is.
        place: a folder; None: the base was known by its id.
        base_model: the id.
    """
    if not place:
        return text
    name = re.escape(place.rstrip("/"))
    if re.search(r"[/\\]", place.rstrip("/")):
        return re.sub(rf"(?<![\w/.-]){name}/?(?![\w/.-])", lambda _: base_model, text)
    field = rf"(?<![\w-])([\"']?(?:{'|'.join(_BASE_FIELDS)})[\"']?[ \t]*:[ \t]*[\"']?){name}/?"
    ends = r"(?=[\"']?[ \t]*(?:[,}#]|$))"
    return re.sub(field + ends, lambda found: found[1] + base_model, text, flags=re.MULTILINE)
