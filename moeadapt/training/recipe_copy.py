"""Keeps the settings of a run beside its adapter, as a recipe that runs again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from moeadapt.hidden_folder import writing

RECIPE = "recipe.yaml"
LEFT_OUT = ("resume_from_checkpoint", "hub_token")
"""What belongs to one start of the run, and what is nobody's business."""


def write_recipe(
    objective: str, settings: Mapping[str, Any], output_dir: str | Path, version: str
) -> Path:
    """Write `recipe.yaml` into a run's folder; one that is there is replaced.

    The folder of the run is named without the folders above it, which exist on one machine only.

    Args:
        objective: the first word after `moeadapt train`.
        settings: the recipe's file and flags, nested as in the file.
        output_dir: the run's folder.
        version: of moeadapt.

    Raises:
        ExportError: the disk does not take it.
    """
    folder = Path(output_dir)
    kept = {key: value for key, value in settings.items() if key not in LEFT_OUT}
    if "output_dir" in kept:
        kept["output_dir"] = folder.resolve().name
    head = f"# moeadapt {version}: moeadapt train {objective} --config {RECIPE}\n"
    text = head + yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
    path, hidden = folder / RECIPE, folder / f".{RECIPE}.partial"
    with writing(path):
        hidden.write_text(text, encoding="utf-8")
        hidden.replace(path)
    return path
