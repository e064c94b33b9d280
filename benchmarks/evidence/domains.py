"""Held-out and training rows of the domains, made from packages: nothing to download by hand.

Three come with the library's demo. Two more are used where their packages are installed: WordNet's
definitions (Debian `wordnet-base`) and SPDX licences (npm `spdx-license-list`).
"""

import json
import random
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

from moeadapt.embedded import TASKS, load_task
from moeadapt.errors import ConfigError

Row = dict[str, str]
WORDNET = Path("/usr/share/wordnet")
LICENSES = Path("node_modules/spdx-license-list/licenses")
FILES = {"wordnet": WORDNET / "data.noun", "license": LICENSES}
"""Where the packages of the further domains put their data."""

_HELD_OUT_EVERY = 5
_MOST_CHARACTERS = 240


def available() -> list[str]:
    """Return the domains whose data is on this machine."""
    return [*TASKS, *(name for name, path in FILES.items() if path.exists())]


def load(
    domains: Sequence[str], *, train: int, validation: int, test: int, longest: int, seed: int
) -> tuple[list[Row], list[Row], list[Row]]:
    """Return training, validation and test rows, all domains in turn.

    Args:
        domains: names out of `available()`.
        train: training rows of each.
        validation: held-out rows of each, to choose the learning rate by.
        test: further held-out rows of each.
        longest: characters of prompt and answer together; longer rows are left out.
        seed: which training rows; the held-out rows are the same for every seed.
    """
    parts: list[list[list[Row]]] = [[], [], []]
    needed = validation + test
    for name in domains:
        pairs = _of_task(name, train, needed, seed) if name in TASKS else _of_package(name, seed)
        short = [[row for row in rows if _length(row) <= longest] for rows in pairs]
        if len(short[0]) < train or len(short[1]) < needed:
            raise SystemExit(
                f"{name} has {len(short[0])} training and {len(short[1])} held-out rows of up to "
                f"{longest} characters; {train} and {needed} were asked for"
            )
        held_out = short[1]
        own = short[0][:train], held_out[:validation], held_out[validation:needed]
        for part, rows in zip(parts, own, strict=True):
            part.append(rows)
    first, second, third = (
        [row for turn in zip(*part, strict=True) for row in turn] for part in parts
    )
    return first, second, third


def _length(row: Row) -> int:
    return len(row["prompt"]) + len(row["completion"])


def _of_task(name: str, train: int, held: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Return more rows than asked for, since long ones will be left out, as far as there are."""
    for spare in (16, 8, 4, 2, 1):
        try:
            held_out = load_task(name, train=0, test=held * spare, seed=0).test
            return load_task(name, train=train * spare, test=0, seed=seed).train, held_out
        except ConfigError:
            continue
    return [], []


def _of_package(name: str, seed: int) -> tuple[list[Row], list[Row]]:
    """Hold out by the prompt alone, so that no seed trains on what another seed tests."""
    pairs = _wordnet() if name == "wordnet" else _licenses()
    rows = [{"prompt": prompt, "completion": text, "domain": name} for prompt, text in pairs]
    held_out = [row for row in rows if zlib.crc32(row["prompt"].encode()) % _HELD_OUT_EVERY == 0]
    others = [row for row in rows if zlib.crc32(row["prompt"].encode()) % _HELD_OUT_EVERY]
    random.Random(0).shuffle(held_out)
    random.Random(seed).shuffle(others)
    return others, held_out


def _wordnet() -> list[tuple[str, str]]:
    """Return a noun and its definition, one per synset."""
    found = {}
    for line in FILES["wordnet"].read_text(encoding="utf-8").splitlines():
        head, _, gloss = line.partition(" | ")
        fields = head.split()
        if line.startswith(" ") or not gloss or not re.fullmatch(r"[a-z]{4,14}", fields[4]):
            continue
        definition = gloss.split(";")[0].strip()
        if definition:
            found.setdefault(f"Define the word: {fields[4]}", definition[:_MOST_CHARACTERS])
    return list(found.items())


def _licenses() -> list[tuple[str, str]]:
    """Return the first lines of a passage of a licence and how it goes on."""
    found = {}
    for path in sorted(FILES["license"].glob("*.json")):
        licence = json.loads(path.read_text(encoding="utf-8"))
        for passage in licence["licenseText"].split("\n\n"):
            words = passage.split()
            if len(words) >= 24:
                opening, rest = " ".join(words[:12]), " ".join(words[12:30])
                found.setdefault(f"Continue the licence: {opening}", rest[:_MOST_CHARACTERS])
    return list(found.items())
