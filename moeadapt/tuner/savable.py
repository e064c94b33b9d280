"""What an adapter must be before it may take the place of a saved one."""

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from moeadapt.adapter_format.options import options
from moeadapt.errors import ConfigError, ExportError


def check_savable(
    model: nn.Module, save_directory: Any, adapters: Iterable[str], safe_serialization: bool
) -> None:
    """Check before anything on the disk changes.

    Args:
        model: the PeftModel.
        save_directory: where to.
        adapters: names of those to be saved.
        safe_serialization: what `save_pretrained` was given.

    Raises:
        ConfigError: no folder is named, or a pickled file is asked for.
        ExportError: a tensor holds NaN or infinity, and the caller does not allow it.
    """
    if not os.fspath(save_directory):
        raise ConfigError("save_directory is empty; name a folder, '.' for the current one")
    if not safe_serialization:
        raise ConfigError(
            "safe_serialization=False asks for a pickled file, which nobody could load: adapters "
            "of moeadapt are safetensors alone; leave it out"
        )
    if options().allow_nonfinite:
        return
    parts = {f".{name}" for name in adapters}
    for name, parameter in model.named_parameters():
        of_adapter = any(f"{part}." in name or name.endswith(part) for part in parts)
        if of_adapter and _is_broken(parameter):
            raise ExportError(
                f"{save_directory} is not written: {name} holds NaN or infinity, and what is there "
                "stays as it is. Lower learning_rate and train again; to save it nevertheless, do "
                "so inside moeadapt.loading_options(allow_nonfinite=True)"
            )


def _is_broken(parameter: nn.Parameter) -> bool:
    # A part of a tensor that is spread over processes is theirs to judge together.
    whole = type(parameter.data) is torch.Tensor and not hasattr(parameter, "ds_id")
    if not whole or parameter.is_meta or not parameter.is_floating_point():
        return False
    return not bool(torch.isfinite(parameter.detach()).all())
