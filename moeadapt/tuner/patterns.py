"""Bounds the time that patterns from a file take, before PEFT matches them against a base."""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from moeadapt.errors import ConfigError
from moeadapt.tuner.config import MoeLoraConfig

SECONDS = 0.5
"""What all patterns of an adapter may take; a usual one takes microseconds."""

START_SECONDS = 20.0
"""For the other interpreter to start on a busy machine."""

SIMPLE = 3
"""With so many repetitions, none of them of a group, time grows at most with the cube of a name."""

KEY_FORM = r"(.*\.)?({})$"
"""How PEFT completes the key of a table of patterns."""

_REPEAT = re.compile(r"[*+?{]")
_REPEATED_GROUP = re.compile(r"\)\s*[*+{]")

# Matching cannot be interrupted in a thread, so it is tried where it can be killed.
_TRY = """
import json, re, signal, sys
patterns, names, seconds = json.load(sys.stdin)
if hasattr(signal, "setitimer"):
    signal.setitimer(signal.ITIMER_REAL, seconds)
for pattern in map(re.compile, patterns):
    for name in names:
        pattern.match(name)
"""


def check_patterns_end(config: MoeLoraConfig, names: Iterable[str]) -> None:
    """Refuse patterns that take too long on the module names of a base.

    Raises:
        ConfigError: names the fields that hold them.
    """
    _check_end(list(_hard_patterns(config)), names, "MoeLoraConfig")


def check_keys_end(field: str, keys: Iterable[str], names: Iterable[str], owner: str) -> None:
    """Refuse keys of a table of patterns that take too long on `names`.

    Args:
        field: name of the table.
        keys: its patterns.
        names: paths of modules.
        owner: whose table it is, named first in the message.

    Raises:
        ConfigError: names the field.
    """
    hard = [(field, KEY_FORM.replace("{}", key)) for key in keys if not _is_simple(key)]
    _check_end(hard, names, owner)


def _check_end(hard: list[tuple[str, str]], names: Iterable[str], owner: str) -> None:
    if not hard:
        return
    data = json.dumps([[pattern for _, pattern in hard], sorted(names), SECONDS])
    command = [sys.executable, "-I", "-S", "-c", _TRY]
    try:
        done = subprocess.run(
            command, input=data, text=True, capture_output=True, timeout=START_SECONDS, check=False
        )
        ended = done.returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        ended = False
    if not ended:
        where = ", ".join(sorted({field for field, _ in hard}))
        raise ConfigError(
            f"{owner}: matching the pattern in {where} takes longer than {SECONDS} s on the "
            "module names of this base; give a list of names, or a pattern without repetition in a "
            "repetition"
        )


def _is_simple(pattern: str) -> bool:
    return len(_REPEAT.findall(pattern)) <= SIMPLE and not _REPEATED_GROUP.search(pattern)


def _hard_patterns(config: MoeLoraConfig) -> Iterator[tuple[str, str]]:
    """Yield field and pattern, as PEFT completes it, of those that may take long."""
    given: list[tuple[str, Any, str]] = []
    for field in ("target_modules", "exclude_modules"):
        value = getattr(config, field)
        if isinstance(value, str) and value != "all-linear":
            given.append((field, value, r"({})\Z"))
    for field in ("rank_pattern", "alpha_pattern", "experts_pattern"):
        value = getattr(config, field)
        given += [(field, key, KEY_FORM) for key in value] if isinstance(value, dict) else []
    layers = config.layers_pattern
    given += [
        ("layers_pattern", one, r".*\.{}\.(\d+)\.")
        for one in ([layers] if isinstance(layers, str) else layers or [])
    ]
    for field, pattern, form in given:
        if _is_simple(pattern):
            continue
        try:
            re.compile(pattern)
        except re.error:
            continue
        yield field, form.replace("{}", pattern)
