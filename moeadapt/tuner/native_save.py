"""`PreTrainedModel.save_pretrained` of an adapter of ours: the folder is the old or the new one."""

import inspect
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from moeadapt.adapter_format.fingerprint import fingerprint
from moeadapt.adapter_format.manifest import remove_manifest, write_manifest
from moeadapt.adapter_format.settings import SETTINGS, WEIGHTS
from moeadapt.errors import ConfigError, ExportError
from moeadapt.tuner.config import MoeLoraConfig
from moeadapt.tuner.savable import check_savable
from moeadapt.whole_folder import whole_folder


def write_manifests(folders: Iterable[Path], base: Any) -> None:
    """Write the manifests of those `folders` that hold an adapter, trained on `base`."""
    present = [f for f in folders if (f / WEIGHTS).is_file() and (f / SETTINGS).is_file()]
    if present:
        print_of_base = fingerprint(base)
        for folder in present:
            write_manifest(folder, print_of_base)


def save_natively(
    original: Callable[..., Any],
    self: PreTrainedModel,
    save_directory: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Write an adapter of ours into a hidden folder first; other models are saved as ever.

    Args:
        original: the method of transformers.
        self: the model.
        save_directory: where to.
        args: further arguments of `original`.
        kwargs: further arguments of `original`; those of a push go to `push_to_hub`, which sends
            the manifest, too.

    Raises:
        ConfigError: the arguments ask for what could not be loaded.
        ExportError: the disk does not take it, or a tensor holds NaN; what is there stays.
    """
    configs = getattr(self, "peft_config", {}) if self._hf_peft_config_loaded else {}
    call = inspect.signature(original).bind(self, save_directory, *args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    ours = any(isinstance(config, MoeLoraConfig) for config in configs.values())
    if not ours or not _saves_here(self, given["is_main_process"]):
        return original(self, save_directory, *args, **kwargs)
    active = self.active_adapters()[0]
    of_method = isinstance(configs.get(active), MoeLoraConfig)
    if given.get("distributed_checkpoint"):
        raise ConfigError(
            f"{save_directory}: distributed_checkpoint=True writes no {WEIGHTS}, and nobody could "
            "load the adapter; leave it out, adapters are small"
        )
    if of_method:
        check_savable(self, save_directory, [active], True)
    push, more = given["push_to_hub"], dict(given["kwargs"])
    given.update(push_to_hub=False, kwargs={})
    _write(original, call, Path(save_directory), of_method)
    if push:
        repo_id = more.pop("repo_id", None) or Path(os.path.abspath(save_directory)).name
        if given.get("token") is not None:
            more["token"] = given["token"]
        self.push_to_hub(repo_id, **more)  # type: ignore[arg-type]
    return None


def _write(
    original: Callable[..., Any], call: inspect.BoundArguments, target: Path, of_method: bool
) -> None:
    model = call.arguments["self"]
    try:
        with whole_folder(target) as folder:
            call.arguments["save_directory"] = str(folder)
            original(*call.args, **call.kwargs)
            if of_method and not (folder / WEIGHTS).is_file():
                raise ConfigError(
                    f"{target} is not written: max_shard_size splits the weights, and an adapter "
                    "has one file of them; leave it out, or raise it"
                )
            if of_method:
                write_manifests([folder], model)
    except (SafetensorError, OSError) as error:
        raise ExportError(
            f"cannot write {target}: {error}; what was there is as it was. Free space, check that "
            "the folder can be written, or name another one"
        ) from error
    if not of_method:
        remove_manifest(target)  # it was that of an adapter of ours, which was there


def _saves_here(model: PreTrainedModel, is_main: bool) -> bool:
    asks = getattr(model, "should_save_on_this_rank", None)
    return bool(asks(is_main) if asks else is_main)
