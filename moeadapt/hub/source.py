"""A model in memory as the folder of a saved adapter."""

from pathlib import Path
from typing import Any

from peft import PeftModel

from moeadapt.errors import ConfigError
from moeadapt.tuner.config import MoeLoraConfig


def saved_model(model: Any, adapter: str, scratch: Path) -> Path:
    """Save one adapter of `model` and return its folder.

    Args:
        model: a PeftModel.
        adapter: its name.
        scratch: an empty folder.

    Raises:
        ConfigError: it is no PeftModel, or has no such mixture.
    """
    if not isinstance(model, PeftModel):
        raise ConfigError(
            f"a {type(model).__name__} cannot be published; give the PeftModel that "
            "get_peft_model or PeftModel.from_pretrained returned, or the folder of a saved "
            "adapter, or of a checkpoint with its receipt"
        )
    config = model.peft_config.get(adapter)
    if not isinstance(config, MoeLoraConfig):
        ours = sorted(n for n, c in model.peft_config.items() if isinstance(c, MoeLoraConfig))
        raise ConfigError(f"the model has no moeadapt adapter {adapter!r}; it has {ours}")
    model.save_pretrained(str(scratch), selected_adapters=[adapter])
    folder = scratch if adapter == "default" else scratch / adapter
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's template
    return folder
