"""Sends every way to load or save an adapter of this method through the same checks.

PEFT and transformers have no hook for it, and a check in one of their functions is passed by in the
others. So the functions that know an adapter's folder are wrapped, once, when the method registers:

- `PeftConfigMixin.from_pretrained`: completes a save that was cut, as all that load do;
- `PeftConfigMixin.from_json_file`, `find_adapter_config_file`: read adapter_config.json, for PEFT
  and for `AutoModel`, before the base is loaded;
- `PeftModel.from_pretrained`, `PeftModel.load_adapter`, `PreTrainedModel.load_adapter`: open the
  folder; what follows knows its files;
- `safe_load_file`, `torch_load`: give the numbers that were checked, whatever lies in the folder by
  then;
- `PeftModel.save_pretrained`, `PreTrainedModel.save_pretrained`: write the manifest;
- `PeftModel.push_to_hub`: says what it leaves out.

Adapters of other methods pass through untouched. Injection (`MoeLoraModel.inject_adapter`) compares
header and base before it touches the model, and `_remap_adapter_state_dict_for_load` refuses what
is not the adapter's even where tensors come from no folder.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers.integrations.peft as native
import transformers.models.auto.auto_factory as auto
from peft import PeftModel, get_peft_model_state_dict
from peft.config import PeftConfigMixin
from peft.utils import save_and_load
from torch import Tensor
from transformers import PreTrainedModel

from moeadapt.adapter_format.adapter import AdapterFiles
from moeadapt.adapter_format.settings import METHOD, SETTINGS, is_ours
from moeadapt.errors import AdapterFileError
from moeadapt.journal import recover
from moeadapt.tuner.config import MoeLoraConfig
from moeadapt.tuner.loading import check_known, check_opened, current, loading, unopened
from moeadapt.tuner.locate import find_folder, hub_arguments, read_config, refuse_uncached
from moeadapt.tuner.native_save import save_natively
from moeadapt.tuner.peft_save import push_to_hub, save_pretrained
from moeadapt.tuner.same_settings import check_same_settings

_WRAPPED = "_moeadapt_wraps"


def install() -> None:
    """Wrap the functions; calling it again does nothing."""
    _wrap(PeftConfigMixin, "from_pretrained", _config_from_pretrained)
    _wrap(PeftConfigMixin, "from_json_file", _from_json_file)
    _wrap(auto, "find_adapter_config_file", _find_config)
    _wrap(native, "find_adapter_config_file", _find_config)
    _wrap(PeftModel, "from_pretrained", _from_pretrained)
    _wrap(PeftModel, "load_adapter", _load_adapter)
    _wrap(native.PeftAdapterMixin, "load_adapter", _load_natively)
    _wrap(save_and_load, "safe_load_file", _safe_load_file)
    _wrap(save_and_load, "torch_load", _torch_load)
    _wrap(PeftModel, "save_pretrained", save_pretrained)
    _wrap(PreTrainedModel, "save_pretrained", save_natively)
    _wrap(PeftModel, "push_to_hub", push_to_hub)


def is_installed() -> bool:
    """Whether PEFT's loading functions are still the wrapped ones."""
    functions = (PeftModel.from_pretrained, PeftModel.load_adapter, save_and_load.safe_load_file)
    return all(hasattr(function, _WRAPPED) for function in functions)


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    original = owner.__dict__[name] if name in owner.__dict__ else getattr(owner, name)
    of_class = isinstance(original, classmethod)
    plain = original.__func__ if of_class else original
    if hasattr(plain, _WRAPPED):
        return

    @functools.wraps(plain)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(plain, *args, **kwargs)

    setattr(wrapped, _WRAPPED, plain)
    setattr(owner, name, classmethod(wrapped) if of_class else wrapped)


# --- settings


def _config_from_pretrained(
    original: Callable[..., Any], cls: Any, model_id: Any, subfolder: Any = None, **kwargs: Any
) -> Any:
    if isinstance(model_id, str | os.PathLike):
        recover(Path(model_id, subfolder or ""))
    return original(cls, model_id, subfolder=subfolder, **kwargs)


def _from_json_file(original: Callable[..., Any], cls: Any, path_json_file: str, **kw: Any) -> Any:
    path = Path(path_json_file)
    if path.name != SETTINGS:
        return original(cls, path_json_file, **kw)
    settings = read_config(path.parent)
    if settings is not None:
        check_opened(path)
        return settings
    lenient = original(cls, path_json_file, **kw)
    if isinstance(lenient, dict) and lenient.get("peft_type") == METHOD:
        raise AdapterFileError(
            f"{path}: PEFT reads settings of {METHOD} in it, and they were not when they were "
            "checked: it changed in between; load it again"
        )
    return lenient


def _find_config(original: Callable[..., Any], model_id: Any, *args: Any, **kwargs: Any) -> Any:
    folder = find_folder(model_id, {k: v for k, v in kwargs.items() if k == "subfolder"}, hub=False)
    if folder is not None:
        read_config(folder)
    found = original(model_id, *args, **kwargs)
    if found is not None and folder is None:
        read_config(Path(found).parent)
    return found


# --- loading


def _from_pretrained(
    original: Callable[..., Any], cls: Any, model: Any, model_id: Any, *args: Any, **kwargs: Any
) -> Any:
    files = _open(model_id, kwargs)
    if files is None:
        given = any(isinstance(x, MoeLoraConfig) for x in (*args, kwargs.get("config")))
        _refuse_unknown(model_id, kwargs, given)
        with unopened():
            return original(cls, model, model_id, *args, **kwargs)
    with loading(files):
        return original(cls, model, str(files.folder), *args, **_inside_folder(kwargs))


def _load_adapter(
    original: Callable[..., Any],
    self: PeftModel,
    model_id: Any,
    adapter_name: str,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if current() is not None:  # inside from_pretrained, which has checked
        return original(self, model_id, adapter_name, *args, **kwargs)
    files = _open(model_id, kwargs)
    if files is None:
        replaces = isinstance(self.peft_config.get(adapter_name), MoeLoraConfig)
        _refuse_unknown(model_id, kwargs, replaces)
        with unopened():
            return original(self, model_id, adapter_name, *args, **kwargs)
    with loading(files):
        if adapter_name in self.peft_config:
            check_same_settings(files.folder, self.peft_config[adapter_name], adapter_name)
            own = get_peft_model_state_dict(
                self, adapter_name=adapter_name, save_embedding_layers=False
            )
            check_known(files, self.get_base_model(), own)
        where = str(files.folder)
        return original(self, where, adapter_name, *args, **_inside_folder(kwargs))


def _inside_folder(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a loading function that is given the folder that was opened.

    Given the name of a repository, it would ask the hub again, and read what was not checked if
    another commit came in between.
    """
    return {name: value for name, value in arguments.items() if name != "subfolder"}


def _load_natively(
    original: Callable[..., Any],
    self: PreTrainedModel,
    peft_model_id: Any = None,
    *args: Any,
    adapter_kwargs: dict[str, Any] | None = None,
    load_config: Any = None,
    **kwargs: Any,
) -> Any:
    more = {"adapter_kwargs": adapter_kwargs, "load_config": load_config, **kwargs}
    given = kwargs.get("adapter_state_dict") is not None or len(args) > 2  # noqa: PLR2004
    known = getattr(load_config, "download_kwargs", None) or {}
    where = {**known, **kwargs, **(adapter_kwargs or {})}
    if given:
        return original(self, peft_model_id, *args, **more)
    # Unlike PEFT, transformers looks for no repository where there is a folder of that name.
    is_folder = isinstance(peft_model_id, str | os.PathLike) and os.path.isdir(peft_model_id)
    files = _open(peft_model_id, where, hub=not is_folder)
    if files is None:
        with unopened():
            return original(self, peft_model_id, *args, **more)
    with loading(files):
        settings = read_config(files.folder)
        if settings is None:
            return original(self, peft_model_id, *args, **more)
        more["peft_config"] = MoeLoraConfig.from_peft_type(**settings)
        # The tensors come from the file that is open; transformers does not open it again.
        more["adapter_state_dict"] = files.tensors  # filled when the checks are passed
        return original(self, peft_model_id, *args, **more)


def _open(model_id: Any, arguments: dict[str, Any], hub: bool = True) -> AdapterFiles | None:
    """Open the adapter of this method behind `model_id`; None: it is none, or not to be found.

    Raises:
        ConfigError: nothing may be fetched, and it is not in the cache.
    """
    where = hub_arguments(arguments)
    folder = find_folder(model_id, where, hub)
    if folder is None:
        refuse_uncached(model_id, where)
    if folder is None or read_config(folder) is None:
        return None
    return AdapterFiles(folder)


def _refuse_unknown(model_id: Any, arguments: dict[str, Any], expects_ours: bool) -> None:
    """Refuse tensors that would get into a mixture without the checks.

    Args:
        model_id: what was not opened as an adapter of this method.
        arguments: of the loading function.
        expects_ours: whether the settings of a mixture are there already.

    Raises:
        AdapterFileError: a mixture is expected, or the folder holds one without its settings.
    """
    if not isinstance(model_id, str | os.PathLike):
        return
    folder = Path(model_id, arguments.get("subfolder") or "")
    lacks = folder.is_dir() and not os.path.lexists(folder / SETTINGS)
    if expects_ours or (lacks and is_ours(folder, "")):
        raise AdapterFileError(
            f"{folder / SETTINGS}: "
            + ("is missing" if lacks else f"cannot be read, or is of another type than {METHOD}")
            + "; without it nothing of the weights can be checked. Take the settings that were "
            "saved with them"
        )


def _safe_load_file(original: Callable[..., Any], filename: Any, *args: Any, **kwargs: Any) -> Any:
    files = current()
    if files is None:
        return original(filename, *args, **kwargs)
    return _checked_numbers(files, filename, kwargs.get("device", args[0] if args else "cpu"))


def _torch_load(original: Callable[..., Any], filename: Any, *args: Any, **kwargs: Any) -> Any:
    """A pickled file is asked for only if the weights vanished after they were opened."""
    files = current()
    if files is None:
        return original(filename, *args, **kwargs)
    return _checked_numbers(files, filename, kwargs.get("map_location", "cpu"))


def _checked_numbers(files: AdapterFiles, filename: Any, device: Any) -> dict[str, Tensor]:
    if Path(filename).parent.resolve() != files.folder.resolve():
        raise AdapterFileError(
            f"{filename}: was about to be loaded in place of {files.path}, which was checked; load "
            "each adapter on its own"
        )
    return {name: tensor.to(device) for name, tensor in files.read().items()}
