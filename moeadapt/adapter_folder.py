"""Reads what a saved adapter says of itself: the settings beside its weights, and no weights."""

import json
from pathlib import Path
from typing import Any

from moeadapt.errors import ConfigError

NAMES = {"LORA": "LoRA", "MOEADAPT": "moeadapt"}
"""peft_type -> what its adapters are called in messages."""

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def read_settings(folder: str | Path, *peft_types: str) -> dict[str, Any]:
    """Return the settings of the adapter in `folder`, of one of `peft_types`, keys of `NAMES`.

    Raises:
        ConfigError: a file is missing or damaged, or it is an adapter of another type.
    """
    folder = Path(folder)
    missing = [name for name in (SETTINGS, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise ConfigError(
            f"{folder} has no {' and no '.join(missing)}; give the folder of an adapter saved with "
            "model.save_pretrained (pickled .bin files are not read)"
        )
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{folder / SETTINGS} is damaged: {error}") from None
    found = settings.get("peft_type") if isinstance(settings, dict) else None
    if found not in peft_types:
        allowed = " or ".join(NAMES[one] for one in peft_types)
        raise ConfigError(f"{folder} is no {allowed} adapter: peft_type is {found!r}")
    return settings
