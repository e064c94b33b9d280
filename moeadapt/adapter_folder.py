"""Reads what a saved adapter says of itself: the settings beside its weights, and no weights."""

from pathlib import Path
from typing import Any

from moeadapt.adapter_format.files import exists, read_small
from moeadapt.adapter_format.settings import (
    MAX_BYTES,
    PICKLED,
    SETTINGS,
    WEIGHTS,
    check_depth,
    load_json,
    no_weights,
)
from moeadapt.errors import AdapterFileError, ConfigError
from moeadapt.journal import recover

NAMES = {"LORA": "LoRA", "MOEADAPT": "moeadapt"}
"""peft_type -> what its adapters are called in messages."""


def read_settings(folder: str | Path, *peft_types: str) -> dict[str, Any]:
    """Return the settings of the adapter in `folder`, of one of `peft_types`, keys of `NAMES`.

    Raises:
        AdapterFileError: a file is damaged.
        ConfigError: a file is missing, or it is an adapter of another type.
    """
    recover(folder)
    folder = Path(folder)
    missing = [name for name in (SETTINGS, WEIGHTS) if not exists(folder, name)]
    if missing:
        if missing == [WEIGHTS] and exists(folder, PICKLED):
            raise AdapterFileError(no_weights(folder))
        raise ConfigError(
            f"{folder} has no {' and no '.join(missing)}; give the folder of an adapter saved with "
            f"model.save_pretrained (pickled .bin files are not read)"
        )
    path = folder / SETTINGS
    try:
        text = read_small(folder, SETTINGS, MAX_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise AdapterFileError(f"{path}: is damaged: it is not UTF-8: {error}") from None
    check_depth(text, path)
    settings = load_json(text, path)
    found = settings.get("peft_type") if isinstance(settings, dict) else None
    if found not in peft_types:
        allowed = " or ".join(NAMES[one] for one in peft_types)
        raise ConfigError(f"{folder} is no {allowed} adapter: peft_type is {found!r}")
    return settings
