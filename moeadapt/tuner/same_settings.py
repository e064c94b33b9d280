"""Compares the settings in an adapter's folder with those of an adapter that is on a model."""

import json
from pathlib import Path
from typing import Any

from peft import PeftConfig

from moeadapt.adapter_format.settings import METHOD, SETTINGS
from moeadapt.errors import AdapterFileError
from moeadapt.tuner.config import MoeLoraConfig
from moeadapt.tuner.locate import read_config
from moeadapt.tuner.quiet import without_warnings

FREE = {
    *("auto_mapping", "base_fingerprint", "base_model_name_or_path", "inference_mode"),
    *("peft_version", "revision"),
}
"""Settings of an adapter that say nothing of its form."""

_SEEN_ELSEWHERE = {
    # Said in several ways; the names of the tensors, which are compared, show what they come to.
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    "modules_to_save",
    # What is of a newer format was refused before; `impl` is how it is computed, not what.
    *("format_version", "moeadapt_version", "impl"),
}


def check_same_settings(folder: Path, config: PeftConfig, adapter: str) -> None:
    """Refuse to put numbers into an adapter that would compute with other settings than theirs.

    PEFT reads no settings for an adapter that is there already, and shapes do not show a scale, or
    the number of experts per token.

    Args:
        folder: of the numbers and their settings, which are of this method.
        config: of the adapter on the model.
        adapter: its name.

    Raises:
        AdapterFileError: lists every difference.
    """
    path = folder / SETTINGS
    saved = read_config(folder)
    if saved is None or not isinstance(config, MoeLoraConfig):
        raise AdapterFileError(
            f"{path}: is of {METHOD}, and adapter {adapter!r} of the model is of "
            f"{config.peft_type}; load it under another name"
        )
    with without_warnings():  # they were told when the settings were checked
        then, now = _plain(MoeLoraConfig(**saved)), _plain(config)
    lines = [
        f"\n  {name}: {now[name]!r} on the model, {then[name]!r} in the folder"
        for name in sorted(now.keys() - FREE - _SEEN_ELSEWHERE)
        if then[name] != now[name]
    ]
    if lines:
        raise AdapterFileError(
            f"{path}: adapter {adapter!r} of the model has other settings:{''.join(lines)}\nThe "
            "numbers would be computed with settings they were not trained with. Load the adapter "
            "under another name, or make the model's adapter with the settings of the folder"
        )


def _plain(config: PeftConfig) -> dict[str, Any]:
    """Return the settings as a file holds them: tuples are lists there, and keys are strings."""
    return json.loads(json.dumps(config.to_dict(), default=str))
