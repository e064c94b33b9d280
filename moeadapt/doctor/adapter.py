"""Checks of an adapter's own files, one by one, so that one damage does not hide another."""

import re
import warnings
from collections import defaultdict
from collections.abc import Iterator

from moeadapt.adapter_format.adapter import check_values, read_numbers, to_tensors
from moeadapt.adapter_format.files import exists, open_file
from moeadapt.adapter_format.header import read_header
from moeadapt.adapter_format.manifest import check_sha256, read_manifest, sha256_of
from moeadapt.adapter_format.settings import MANIFEST, PICKLED, SETTINGS, WEIGHTS, no_weights
from moeadapt.doctor.finding import Finding, Subject
from moeadapt.errors import AdapterFileError

_FACTOR = re.compile(r"(.+)\.(moeadapt_(?!router\.)[^.]+\.[^.]+)")
"""A layer and its factor; of routers one may stand for several layers."""

_NUMBER = re.compile(r"\.\d+(?=\.)")
_NAMED = 5


def settings(subject: Subject) -> Iterator[Finding]:
    """Read adapter_config.json as loading does."""
    from moeadapt.tuner.locate import read_config

    found = read_config(subject.place)
    if found is None:
        yield Finding(
            check="settings",
            level="error",
            what=f"{subject.place / SETTINGS}: is no adapter of moeadapt",
            why="it cannot be checked here, and PEFT loads it as what it is",
            cure="give the folder of a mixture; an ordinary LoRA adapter needs no doctor",
        )
    subject.facts["settings"] = found


def header(subject: Subject) -> Iterator[Finding]:
    """Read the header of the weights, and see whether the settings can need such tensors."""
    folder = subject.place
    if not exists(folder, WEIGHTS):
        if not exists(folder, PICKLED):  # else the check of pickles has said it
            raise AdapterFileError(no_weights(folder))
        return
    with open_file(folder, WEIGHTS) as file:
        subject.facts["header"] = found = read_header(file, folder / WEIGHTS)
    if subject.facts.get("settings"):
        from moeadapt.tuner.config import MoeLoraConfig
        from moeadapt.tuner.expected import check_plausible

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the check of the settings has told them
            config = MoeLoraConfig(**subject.facts["settings"])
        check_plausible(config, found, folder / WEIGHTS)
    yield from ()


def factors(subject: Subject) -> Iterator[Finding]:
    """Find layers that lack a factor which others of the same place have; needs no base."""
    found = subject.facts.get("header")
    if found is None:
        yield Finding(check="factors", level="skipped", what="the header cannot be read")
        return
    parts: dict[str, set[str]] = defaultdict(set)
    for name in found.tensors:
        match = _FACTOR.fullmatch(name)
        if match:
            parts[match[1]].add(match[2])
    everywhere: dict[str, set[str]] = defaultdict(set)
    for layer, own in parts.items():
        everywhere[_NUMBER.sub(".*", layer)] |= own
    lacking = [
        f"{layer}.{name}"
        for layer, own in parts.items()
        for name in sorted(everywhere[_NUMBER.sub(".*", layer)] - own)
    ]
    if lacking:
        yield Finding(
            check="factors",
            level="error",
            what=f"{subject.place / WEIGHTS}: lacks {len(lacking)} tensors that its other layers "
            f"have: {', '.join(lacking[:_NAMED])}{', ...' * (len(lacking) > _NAMED)}",
            why="loading refuses it",
            cure="take the file that was saved; half an adapter gives wrong answers",
        )


def manifest(subject: Subject) -> Iterator[Finding]:
    """Read the manifest: what the files were, and on which base it was trained."""
    folder = subject.place
    if not exists(folder, MANIFEST):
        yield Finding(
            check="manifest",
            level="warning",
            what=f"{folder}: has no {MANIFEST}",
            why="it cannot be checked that the files are as they were saved, nor on which base",
            cure="load it on its base and save it again, which writes one",
        )
        return
    subject.facts["manifest"] = read_manifest(folder)


def sha256(subject: Subject) -> Iterator[Finding]:
    """Compare the files with the manifest."""
    folder, said = subject.place, subject.facts.get("manifest")
    if said is None:
        yield Finding(check="sha256", level="skipped", what=f"no {MANIFEST} to compare with")
    for name in (SETTINGS, WEIGHTS):
        if said is None or not exists(folder, name):
            continue
        try:
            check_sha256(said, folder, name, sha256_of(folder, name))
        except AdapterFileError as error:
            yield Finding(
                check="sha256",
                level="error",
                what=str(error),
                why="the file was damaged or changed after it was saved; loading refuses it",
            )


def numbers(subject: Subject) -> Iterator[Finding]:
    """Look for NaN, infinity and numbers that overflow, tensor by tensor."""
    folder, found = subject.place, subject.facts.get("header")
    if found is None:
        yield Finding(check="numbers", level="skipped", what="the header cannot be read")
        return
    with open_file(folder, WEIGHTS) as file:
        file.seek(len(found.raw))
        data = read_numbers(file, found, folder / WEIGHTS)
    for name, tensor in to_tensors(data, found):
        try:
            check_values({name: tensor}, folder / WEIGHTS)
        except AdapterFileError as error:
            yield Finding(
                check="numbers",
                level="error",
                what=str(error),
                why="every output of the model would be NaN",
            )
