"""Reads what a saved adapter says of itself: the settings beside its weights, and no weights."""

import json
from pathlib import Path
from typing import Any

from moeadapt.errors import ConfigError

NAMES = {"LORA": "LoRA", "MOEADAPT": "moeadapt"}
"""peft_type -> what its adapters are called in messages."""

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def read_settings(folder: str | Path, peft_type: str) -> dict[str, Any]:
    """Return the settings of the adapter of `peft_type`, a key of `NAMES`, in `folder`.

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
    if found != peft_type:
        raise ConfigError(f"{folder} is no {NAMES[peft_type]} adapter: peft_type is {found!r}")
    return settings
