"""The adapter that is being loaded here and now, and the checks it must pass on its base."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from peft.tuners.tuners_utils import (
    _filter_state_dict_by_key_prefixes,
    _get_tuner_state_dict_key_prefixes,
)
from torch import Tensor, nn

from moeadapt.adapter_format.adapter import AdapterFiles
from moeadapt.adapter_format.fingerprint import compare, fingerprint
from moeadapt.adapter_format.match import TensorSpec, check_tensors, some
from moeadapt.adapter_format.options import options
from moeadapt.adapter_format.settings import SETTINGS
from moeadapt.errors import AdapterFileError, ConfigError, UnsupportedError
from moeadapt.experts import BankSize
from moeadapt.tuner.config import MoeLoraConfig
from moeadapt.tuner.expected import FILE_PREFIX, TOKENS, expected_tensors
from moeadapt.tuner.plan import TargetPlan

_CURRENT: ContextVar[AdapterFiles | None] = ContextVar("moeadapt_loading", default=None)

_UNOPENED: ContextVar[bool] = ContextVar("moeadapt_unopened", default=False)


def current() -> AdapterFiles | None:
    """Return the files of the adapter that is being loaded; None: it comes from no folder."""
    return _CURRENT.get()


@contextmanager
def loading(files: AdapterFiles) -> Iterator[None]:
    """Make `files` the adapter that is being loaded."""
    token = _CURRENT.set(files)
    try:
        yield
    finally:
        _CURRENT.reset(token)
        files.close()


@contextmanager
def unopened() -> Iterator[None]:
    """Say that what is being loaded was not opened, since it is of another method or not there."""
    token = _UNOPENED.set(True)
    try:
        yield
    finally:
        _UNOPENED.reset(token)


def check_opened(path: Path) -> None:
    """Refuse settings of this method for an adapter whose files nobody has opened.

    The hub did not answer us but answered PEFT, or the folder was filled in between.

    Args:
        path: the settings that PEFT is about to use.

    Raises:
        AdapterFileError: names them.
    """
    if _UNOPENED.get() and _CURRENT.get() is None:
        raise AdapterFileError(
            f"{path}: was not there, or could not be fetched, when the adapter was to be checked, "
            "so nothing of it was; load it again"
        )


@contextmanager
def naming_settings() -> Iterator[None]:
    """Let a refusal of the settings name the file that they come from, if they come from one.

    Raises:
        AdapterFileError: in place of another `ConfigError`.
        UnsupportedError: with the file's name before its words.
    """
    files = _CURRENT.get()
    try:
        yield
    except AdapterFileError:
        raise
    except (ConfigError, UnsupportedError) as error:
        if files is None:
            raise
        kind = AdapterFileError if isinstance(error, ConfigError) else UnsupportedError
        raise kind(f"{files.folder / SETTINGS}: {error}") from None


def check_new(
    files: AdapterFiles,
    model: nn.Module,
    config: MoeLoraConfig,
    plans: Mapping[str, TargetPlan],
    sizes: Mapping[str, BankSize],
) -> None:
    """Check the files before the adapter is put on `model`.

    Raises:
        AdapterFileError: they do not fit each other or the base; nothing was touched.
    """
    expected = expected_tensors(model, config, plans, sizes)
    if files.manifest is None and config.base_fingerprint and not options().allow_other_base:
        # Copied without its manifest: the sizes of the base are known nevertheless.
        known = {"config": config.base_fingerprint}
        compare(known, fingerprint(model), f"{files.folder}: this adapter")
    _check(files, model, expected)
    _warn_of_idle_targets(config, plans, files)


def check_known(files: AdapterFiles, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Check the files before they replace the numbers of an adapter that is on the model.

    Args:
        files: what is loaded.
        model: the base model, with the adapter.
        tensors: the adapter's, named as in a file.

    Raises:
        AdapterFileError: see `check_new`.
    """
    specs = {
        name: TensorSpec(shape=tuple(t.shape), is_float=t.is_floating_point())
        for name, t in tensors.items()
    }
    _check(files, model, specs)


def _check(files: AdapterFiles, model: nn.Module, expected: Mapping[str, TensorSpec]) -> None:
    _check_base(files, model)
    check_tensors(
        files.header.tensors,
        expected,
        files.path,
        _base_names(model),
        options().allow_base_weights,
    )
    files.read()


def _base_names(model: nn.Module) -> set[str]:
    """Return the tensors of the base, wrapped or not, as a file would name them."""
    names = {FILE_PREFIX + name for name in model.state_dict()}
    plain = {name.replace(".base_layer.", ".") for name in names}
    wrapped = {".base_layer.".join(name.rsplit(".", 1)) for name in plain}
    return names | plain | wrapped


def _check_base(files: AdapterFiles, model: nn.Module) -> None:
    if files.manifest is None or options().allow_other_base:
        return
    saved = files.manifest.get("base")
    if not isinstance(saved, dict) or not saved:
        warnings.warn(
            f"{files.folder}: its manifest does not say on which base it was trained, so another "
            "base would not be noticed; save it again from the model it was trained in",
            stacklevel=2,
        )
        return
    _, notes = compare(saved, fingerprint(model), f"{files.folder}: this adapter")
    for note in notes:
        warnings.warn(note, stacklevel=2)


def _warn_of_idle_targets(
    config: MoeLoraConfig, plans: Mapping[str, TargetPlan], files: AdapterFiles
) -> None:
    """Say which names of `target_modules` match nothing while others do."""
    targets = config.target_modules
    if not isinstance(targets, set) or config.placement == "glu":
        return
    idle = sorted(t for t in targets if not any(f".{key}".endswith(f".{t}") for key in plans))
    if idle and plans:
        warnings.warn(
            f"{files.folder}: target_modules {idle} match nothing in this base; the other "
            f"{len(targets) - len(idle)} match {len(plans)} modules",
            stacklevel=2,
        )


def check_state_dict(found: Iterable[str], model: nn.Module, adapter: str) -> None:
    """Refuse tensors that are not the adapter's, whatever way they came.

    Args:
        found: the names in the model of what is about to be written into it.
        model: the model with the adapter.
        adapter: its name.

    Raises:
        AdapterFileError: lists them.
    """
    state = model.state_dict()
    known = _filter_state_dict_by_key_prefixes(
        state, _get_tuner_state_dict_key_prefixes(model, adapter_name=adapter)
    )
    in_full = (f".modules_to_save.{adapter}.", f".{TOKENS}.{adapter}")
    extra = [
        name
        for name in found
        if name not in known and not (name in state and any(p in name for p in in_full))
    ]
    if extra and not options().allow_base_weights:
        raise AdapterFileError(
            f"{some(extra)}: not the adapter's; they would be written into the base model, or be "
            "lost. Leave them out, or use moeadapt.loading_options(allow_base_weights=True)"
        )
