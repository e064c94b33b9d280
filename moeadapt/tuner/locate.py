"""Finds the folder behind the name of an adapter, and reads the settings in it."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from moeadapt.adapter_format.settings import (
    MANIFEST,
    METHOD,
    SETTINGS,
    WEIGHTS,
    known_fields,
    parse,
)
from moeadapt.errors import AdapterFileError, ConfigError
from moeadapt.journal import recover

_NO_ANSWER = (
    "{}: {} could not be fetched, so its files cannot be compared with what was saved: {}. "
    "Load it again"
)

_HUB = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")


def hub_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Pick from the arguments of a loading function those that say where a file is."""
    found = {k: v for k, v in arguments.items() if k in _HUB and v is not None}
    if "token" not in found and arguments.get("use_auth_token") is not None:
        found["token"] = arguments["use_auth_token"]
    return found


def find_folder(model_id: Any, where: dict[str, Any], hub: bool = True) -> Path | None:
    """Return the folder with an adapter's files; None if there is none, which PEFT reports itself.

    For an adapter of the hub it is the folder of the hub's cache, its files fetched.

    Args:
        model_id: a folder, or a repository of the hub.
        where: what `hub_arguments` returned.
        hub: whether to look at the hub, too.

    Raises:
        AdapterFileError: a save to the folder was cut and cannot be completed, or the settings of
            an adapter of this method are no file.
    """
    if not isinstance(model_id, str | os.PathLike):
        return None
    folder = Path(model_id, where.get("subfolder") or "")
    recover(folder)
    if os.path.isfile(folder / SETTINGS):
        return folder
    if os.path.lexists(folder / SETTINGS):
        parse(folder)  # refuses what is ours; PEFT looks past a name that is no file
    # A folder of the same name does not keep PEFT from the hub; what is no string does.
    return _fetch(model_id, where) if hub and isinstance(model_id, str) else None


def _fetch(repository: str, where: dict[str, Any]) -> Path | None:
    from huggingface_hub import hf_hub_download

    try:
        folder = Path(hf_hub_download(repository, SETTINGS, **where)).parent
    except Exception:
        # Missing, unreachable, not allowed: PEFT meets the same and says so.
        return None
    if (parse(folder) or {}).get("peft_type") != METHOD:
        return None
    # All files are of the commit of the settings, should another one come in between.
    depth = len(Path(where.get("subfolder") or ".").parts)
    pinned = {**where, "revision": [folder, *folder.parents][depth].name}
    # PEFT fetches the weights, too, and says what prevents it.
    with suppress(Exception):
        hf_hub_download(repository, WEIGHTS, **pinned)
    _fetch_manifest(repository, pinned)
    return folder


def _fetch_manifest(repository: str, where: dict[str, Any]) -> None:
    """Fetch the manifest, if there is one; without an answer nothing could be compared.

    Raises:
        AdapterFileError: the hub does not say whether there is one.
    """
    from huggingface_hub import hf_hub_download, is_offline_mode
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

    try:
        hf_hub_download(repository, MANIFEST, **where)
    except RemoteEntryNotFoundError:
        return
    except LocalEntryNotFoundError as error:
        if not where.get("local_files_only") and not is_offline_mode():
            raise AdapterFileError(_NO_ANSWER.format(repository, MANIFEST, error)) from None
    except Exception as error:
        raise AdapterFileError(_NO_ANSWER.format(repository, MANIFEST, error)) from None


def refuse_uncached(model_id: Any, where: dict[str, Any]) -> None:
    """Refuse an adapter of the hub that is not in the cache while nothing may be fetched.

    Args:
        model_id: a folder, or a repository of the hub.
        where: what `hub_arguments` returned.

    Raises:
        ConfigError: names the folder of the cache.
    """
    from huggingface_hub import constants, is_offline_mode
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    given = where.get("local_files_only")
    if not isinstance(model_id, str) or os.path.exists(model_id):
        return
    if not (given or is_offline_mode()):
        return
    try:
        validate_repo_id(model_id)
    except HFValidationError:
        return
    cache = Path(where.get("cache_dir") or constants.HF_HUB_CACHE)
    folder = cache / f"models--{model_id.replace('/', '--')}"
    if next(folder.glob(f"snapshots/*/{where.get('subfolder') or '.'}/{SETTINGS}"), None):
        return  # another revision, say; PEFT says which
    reason = "local_files_only is set" if given else "HF_HUB_OFFLINE is set"
    raise ConfigError(
        f"{model_id}: {reason}, and {folder} holds no {SETTINGS}; load it once with a network, or "
        "give the folder of the adapter"
    )


def read_config(folder: Path) -> dict[str, Any] | None:
    """Return the checked settings of an adapter of this method; None if it is of another.

    Raises:
        AdapterFileError: see `moeadapt.adapter_format.settings.parse`; or a field has the wrong
            type, is out of range, names something unknown, or contradicts another.
    """
    from dataclasses import fields

    from moeadapt.tuner.config import MoeLoraConfig
    from moeadapt.tuner.quiet import without_warnings

    settings = parse(folder)
    if settings is None or settings["peft_type"] != METHOD:
        return None
    path = folder / SETTINGS
    settings = known_fields(settings, {f.name for f in fields(MoeLoraConfig) if f.init}, path)
    try:
        with without_warnings():  # the one that is kept warns
            MoeLoraConfig(**settings)
    except (ValueError, TypeError) as error:
        raise AdapterFileError(f"{path}: {error}") from None
    return settings
