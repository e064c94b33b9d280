"""Loads an adapter of this method and nothing else, with what the caller allows."""

from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from moeadapt.adapter_format.options import loading_options
from moeadapt.errors import ConfigError
from moeadapt.tuner.locate import find_folder, hub_arguments, read_config, refuse_uncached


def load_adapter_checked(
    model: nn.Module,
    folder: str | Path,
    adapter_name: str = "default",
    *,
    allow_nonfinite: bool = False,
    allow_other_base: bool = False,
    allow_base_weights: bool = False,
    **kwargs: Any,
) -> PeftModel:
    """Load an adapter of this method on `model`; `PeftModel.from_pretrained` makes the same checks.

    Args:
        model: a base model, or a `PeftModel` that gets one more adapter.
        folder: the adapter, or a repository of the hub.
        adapter_name: its name in the model.
        allow_nonfinite: tensors may hold NaN or infinity.
        allow_other_base: the base may differ from the one it was trained on.
        allow_base_weights: weights of the base in its file replace those of `model`.
        kwargs: further arguments of `PeftModel.from_pretrained` or `PeftModel.load_adapter`.

    Raises:
        ConfigError: there is no such adapter, or it cannot be put on this base.
        AdapterFileError: a file is damaged, or does not fit its settings or the base. `model` is
            as it was.

    Example:
        >>> model = moeadapt.load_adapter_checked(base, "adapters/math")
    """
    where = hub_arguments(kwargs)
    found = find_folder(folder, where)
    if found is None:
        refuse_uncached(folder, where)
    if found is None or read_config(found) is None:
        raise ConfigError(
            f"{folder} holds no moeadapt adapter; give a folder saved with model.save_pretrained"
        )
    with loading_options(
        allow_nonfinite=allow_nonfinite,
        allow_other_base=allow_other_base,
        allow_base_weights=allow_base_weights,
    ):
        if not isinstance(model, PeftModel):
            return PeftModel.from_pretrained(model, folder, adapter_name, **kwargs)
        model.load_adapter(folder, adapter_name, **kwargs)
        return model
