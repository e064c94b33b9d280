"""An adapter's folder as a parcel: checked as for loading, and named by its base's id."""

import json
from pathlib import Path
from typing import Any

from moeadapt.adapter_format.files import exists, open_file, read_small
from moeadapt.adapter_format.header import read_header
from moeadapt.adapter_format.manifest import read_manifest
from moeadapt.adapter_format.settings import MANIFEST, MAX_BYTES, SETTINGS, WEIGHTS
from moeadapt.doctor.examine import examine
from moeadapt.errors import AdapterFileError
from moeadapt.hub.names import check_base_model, is_path
from moeadapt.hub.parcel import CARD, Parcel, sha256_of
from moeadapt.tuner.locate import read_config
from moeadapt.version import FORMAT_VERSION, __version__

CHECKS = ("links", "settings", "header", "manifest", "sha256", "numbers")
"""Of `moeadapt doctor`."""


def adapter_parcel(folder: Path, base_model: str | None = None) -> Parcel:
    """Check a saved adapter and collect what is sent of it: no pickles, no checkpoints.

    Args:
        folder: of an adapter of this method.
        base_model: id of its base; None: what its settings say.

    Raises:
        AdapterFileError: a file is damaged, or not the one that was saved.
        ConfigError: the base is unknown or has no id.
    """
    for finding in examine(folder, only=CHECKS):
        if finding.level == "error":
            raise AdapterFileError(f"{finding.what}; nothing was sent")
    settings = read_config(folder) or {}
    named = settings.get("base_model_name_or_path")
    base = check_base_model(named, str(folder / SETTINGS), base_model)
    parcel = Parcel(
        kind="adapter",
        folder=folder,
        base_model=base,
        place=named if is_path(named) else None,
    )
    parcel.files[WEIGHTS] = folder / WEIGHTS
    parcel.files[SETTINGS] = _settings(folder, base)
    parcel.add_companions()
    with open_file(folder, WEIGHTS) as file:
        header = read_header(file, folder / WEIGHTS)
    parcel.facts = {
        **settings,
        "base_model_name_or_path": base,
        "parameters": sum(info.size for info in header.tensors.values()),
        "weight_bytes": header.data_bytes,
    }
    return parcel


def _settings(folder: Path, base_model: str) -> bytes:
    settings = json.loads(read_small(folder, SETTINGS, MAX_BYTES))
    settings["base_model_name_or_path"] = base_model
    settings.setdefault("format_version", FORMAT_VERSION)
    saved = read_manifest(folder) if exists(folder, MANIFEST) else None
    if saved is not None and isinstance(saved.get("base"), dict):
        settings["base_fingerprint"] = saved["base"].get("config")
    return (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode()


def seal(parcel: Parcel) -> None:
    """Add the manifest: a sha256 of every file but the card, which its owner may edit.

    Call it when all other files are in the parcel.

    Raises:
        AdapterFileError: the weights are not those that were checked.
    """
    saved: dict[str, Any] = read_manifest(parcel.folder) or {} if _has_manifest(parcel) else {}
    files = {
        name: sha256_of(content)
        for name, content in sorted(parcel.files.items())
        if name not in (CARD, MANIFEST)
    }
    known = saved.get("files", {}).get(WEIGHTS, files[WEIGHTS])
    if known != files[WEIGHTS]:
        raise AdapterFileError(
            f"{parcel.folder / WEIGHTS}: changed while it was read; push it again"
        )
    manifest = {
        "format_version": FORMAT_VERSION,
        "moeadapt_version": saved.get("moeadapt_version", __version__),
        "files": files,
        "base": _base(saved.get("base"), parcel),
    }
    text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
    parcel.files[MANIFEST] = text.encode()


def _has_manifest(parcel: Parcel) -> bool:
    return exists(parcel.folder, MANIFEST)


def _base(saved: Any, parcel: Parcel) -> Any:
    """Return the fingerprint of the base, under its id."""
    if not isinstance(saved, dict):
        return None
    name = saved.get("name")
    return {**saved, "name": parcel.base_model if not name or is_path(name) else name}
