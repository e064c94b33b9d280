"""`moeadapt_manifest.json`: the version of the format, a sha256 per file, what the base is."""

import hashlib
import json
import os
import uuid
import warnings
from pathlib import Path
from typing import Any

from moeadapt.adapter_format.files import exists, open_file
from moeadapt.adapter_format.settings import MANIFEST, SETTINGS, WEIGHTS, read_object
from moeadapt.errors import AdapterFileError
from moeadapt.version import FORMAT_VERSION, __version__

MAX_BYTES = 1 << 20
_CHUNK = 1 << 20
_told: set[Path] = set()
"""Folders whose lack of a manifest was mentioned."""


def write_manifest(folder: str | Path, base: dict[str, Any] | None) -> None:
    """Write the manifest of the adapter in `folder`, once its files are complete.

    Args:
        folder: holds the settings and the weights.
        base: what `moeadapt.adapter_format.fingerprint.fingerprint` returned; None: unknown.
    """
    folder = Path(folder)
    manifest = {
        "format_version": FORMAT_VERSION,
        "moeadapt_version": __version__,
        "files": {name: sha256_of(folder, name) for name in (SETTINGS, WEIGHTS)},
        "base": base,
    }
    # A reader sees the old manifest or the new one, never half of it.
    partial = folder / f".{MANIFEST}.partial-{uuid.uuid4().hex[:8]}"
    partial.write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(partial, folder / MANIFEST)


def remove_manifest(folder: str | Path) -> None:
    """Remove the manifest before the files it vouches for change."""
    (Path(folder) / MANIFEST).unlink(missing_ok=True)


def sha256_of(folder: Path, name: str) -> str:
    """Return the sha256 of a file of an adapter, in hex."""
    digest = hashlib.sha256()
    with open_file(folder, name) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read the manifest; None, with one warning per folder, if there is none.

    Raises:
        AdapterFileError: it is damaged, or a newer moeadapt wrote it.
    """
    path = folder / MANIFEST
    if not exists(folder, MANIFEST):
        if path.resolve() not in _told:
            _told.add(path.resolve())
            warnings.warn(
                f"{folder} has no {MANIFEST}, so it cannot be checked that its files are as they "
                "were saved, and on which base it was trained; saving it again writes one",
                stacklevel=2,
            )
        return None
    manifest = read_object(folder, MANIFEST, MAX_BYTES)
    version = manifest.get("format_version")
    if type(version) is not int or version < 1:
        raise AdapterFileError(
            f"{path}: format_version={version!r} must be an integer >= 1; {_CURE}"
        )
    if version > FORMAT_VERSION:
        raise AdapterFileError(needs_newer(path, version, manifest.get("moeadapt_version")))
    files = manifest.get("files")
    names = set(files) if isinstance(files, dict) else set()
    if not isinstance(files, dict) or not {SETTINGS, WEIGHTS} <= names:
        raise AdapterFileError(f"{path}: files must hold the sha256 of {SETTINGS} and {WEIGHTS}")
    return manifest


_CURE = "copy the adapter again from where it was saved"


def needs_newer(path: Path, version: object, writer: object) -> str:
    """Say that a newer moeadapt wrote `path`."""
    return (
        f"{path}: format_version={version!r} needs moeadapt >= {writer}, which wrote it; this is "
        f"moeadapt {__version__}, which reads formats up to {FORMAT_VERSION}. Upgrade with "
        "`pip install -U moeadapt`."
    )


def check_sha256(manifest: dict[str, Any], folder: Path, name: str, found: str) -> None:
    """Refuse a file that is not the one the manifest vouches for.

    Raises:
        AdapterFileError: names the file and both ways out.
    """
    expected = manifest["files"][name]
    if found != expected:
        raise AdapterFileError(
            f"{folder / name}: is not as it was saved: its sha256 is {found}, and {MANIFEST} says "
            f"{expected}. Copy the adapter again; if you changed the file on purpose, delete "
            f"{MANIFEST}."
        )
