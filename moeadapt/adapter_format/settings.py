"""Reads `adapter_config.json`: plain data, of a closed set of fields; nothing in it is followed."""

import json
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

from moeadapt.adapter_format.files import exists, open_file, read_small
from moeadapt.errors import AdapterFileError, did_you_mean

SETTINGS, WEIGHTS, PICKLED = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
MANIFEST = "moeadapt_manifest.json"
METHOD = "MOEADAPT"

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
_START = 1 << 16
"""Bytes of the weights in which the name of one of our tensors must occur to call them ours."""

TRUST = ("trust_remote_code",)
"""Ignored with a warning: only the caller can say so."""


def parse(folder: Path) -> Any:
    """Return what the settings hold; damaged ones are refused only if the adapter is ours.

    Raises:
        AdapterFileError: the file is no file, or not JSON of a reasonable size and depth, or no
            object, or says no `peft_type`, and something in the folder says that it is ours.
    """
    path = folder / SETTINGS
    text = ""
    try:
        text = read_small(folder, SETTINGS, MAX_BYTES).decode("utf-8")
        check_depth(text, path)
        settings = load_json(text, path)
        if not isinstance(settings, dict):
            kind = type(settings).__name__
            raise AdapterFileError(
                f"{path}: line 1, column 1: is a {kind}, not an object of fields"
            )
        if not isinstance(settings.get("peft_type"), str):
            raise AdapterFileError(
                f"{path}: field peft_type is {settings.get('peft_type')!r}; it must be a string, "
                f"{METHOD!r} for an adapter of moeadapt"
            )
        if settings["peft_type"] != METHOD and holds_our_tensors(folder):
            raise AdapterFileError(
                f"{path}: field peft_type is {settings['peft_type']!r}, but {WEIGHTS} holds "
                f"tensors of {METHOD!r}: the settings are damaged, or of another adapter. Take "
                "those that were saved with the weights"
            )
    except UnicodeDecodeError as error:
        _refuse_ours(folder, text, AdapterFileError(f"{path}: is not UTF-8: {error}"))
    except AdapterFileError as error:
        _refuse_ours(folder, text, error)
    else:
        return settings
    return None


def _refuse_ours(folder: Path, text: str, error: AdapterFileError) -> None:
    if is_ours(folder, text):
        raise error from None


def is_ours(folder: Path, text: str) -> bool:
    """Whether a folder whose settings cannot be read holds an adapter of this method."""
    return (
        METHOD in text
        or exists(folder, MANIFEST)
        or holds_our_tensors(folder)
        or _is_ours_to_peft(folder / SETTINGS)
    )


def _is_ours_to_peft(path: Path) -> bool:
    """Whether PEFT, which takes what the strict reading refuses, would read settings of ours."""
    if not path.is_file():
        return False
    try:
        with open(path) as file:  # in the encoding that PEFT opens it in
            settings = json.load(file)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(settings, dict) and settings.get("peft_type") == METHOD


def holds_our_tensors(folder: Path) -> bool:
    """Whether the weights beside the settings are those of an adapter of this method."""
    if not (folder / WEIGHTS).is_file():
        return False
    try:
        with open_file(folder, WEIGHTS) as file:
            return f"{METHOD.lower()}_".encode() in file.read(_START)
    except AdapterFileError:
        return False


def load_json(text: str, path: Path) -> Any:
    """Parse JSON strictly: no field twice, no nesting without end.

    Raises:
        AdapterFileError: with line and column.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for name, value in pairs:
            if name in fields:
                raise AdapterFileError(f"{path}: field {name!r} is there twice; keep one")
            fields[name] = value
        return fields

    def number(literal: str) -> int:
        if len(literal) > 20:  # noqa: PLR2004
            raise AdapterFileError(f"{path}: {literal[:20]}... is a number of too many digits")
        return int(literal)

    try:
        return json.loads(text, object_pairs_hook=unique, parse_int=number)
    except json.JSONDecodeError as error:
        raise AdapterFileError(
            f"{path}: line {error.lineno}, column {error.colno}: {error.msg}; the file is damaged, "
            "copy the adapter again from where it was saved"
        ) from None
    except RecursionError:
        raise AdapterFileError(f"{path}: is nested without end; it is damaged") from None


def read_object(folder: Path, name: str, limit: int) -> dict[str, Any]:
    """Return the fields of a JSON file of at most `limit` bytes.

    Raises:
        AdapterFileError: see `read_small` and `load_json`, or it is not UTF-8, or no object.
    """
    path = folder / name
    try:
        found = load_json(read_small(folder, name, limit).decode("utf-8"), path)
    except UnicodeDecodeError as error:
        raise AdapterFileError(f"{path}: is not UTF-8: {error}; {_CURE}") from None
    if not isinstance(found, dict):
        raise AdapterFileError(f"{path}: is no object of fields; {_CURE}")
    return found


_CURE = "copy the adapter again from where it was saved"


def check_depth(text: str, path: Path) -> None:
    """Refuse settings nested more than `MAX_DEPTH` deep.

    Raises:
        AdapterFileError: with line and column.
    """
    depth, quoted, escaped = 0, False, False
    for at, sign in enumerate(text):
        if escaped:
            escaped = False
        elif quoted:
            escaped, quoted = sign == "\\", sign != '"'
        elif sign == '"':
            quoted = True
        elif sign in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                line = text.count("\n", 0, at) + 1
                column = at - text.rfind("\n", 0, at)
                raise AdapterFileError(
                    f"{path}: line {line}, column {column}: nested more than {MAX_DEPTH} deep; "
                    "this is not a file that moeadapt wrote"
                )
        elif sign in "]}":
            depth -= 1


def known_fields(settings: dict[str, Any], known: Collection[str], path: Path) -> dict[str, Any]:
    """Return the settings without fields that nobody here knows; warns once and lists them.

    Args:
        settings: of an adapter of this method.
        known: the fields of the configuration.
        path: named in messages.

    Raises:
        AdapterFileError: a field would be handed on to a loader.
    """
    unknown = [name for name in settings if name not in known]
    for name in unknown:
        if name.endswith("_kwargs"):
            _refuse_loader(name, path)
    trusting = [name for name in unknown if name in TRUST]
    if trusting:
        _warn_once(
            path,
            f"{path}: {trusting[0]}={settings[trusting[0]]!r} is ignored: only the caller of a "
            "loading function can say whose code to run",
        )
    rest = sorted(name for name in unknown if name not in TRUST)
    if rest:
        hints = "".join(did_you_mean(name, known) for name in rest[:1])
        _warn_once(
            path,
            f"{path}: unknown fields {rest} are ignored{hints}. They may come from a newer "
            "moeadapt that wrote the same format; `pip install -U moeadapt` may know them.",
        )
    return {name: value for name, value in settings.items() if name in known}


_told: set[tuple[Path, str]] = set()


def _warn_once(path: Path, message: str) -> None:
    """Warn once per file: one load reads the settings several times."""
    if (path.resolve(), message) not in _told:
        _told.add((path.resolve(), message))
        warnings.warn(message, stacklevel=3)


def _refuse_loader(name: str, path: Path) -> NoReturn:
    raise AdapterFileError(
        f"{path}: field {name!r}: an adapter's settings are data, and arguments for a loader are "
        "taken only from its caller; remove the field"
    )


def no_weights(folder: Path) -> str:
    """Say what a folder without safetensors lacks, and what to do with a pickled file."""
    if not exists(folder, PICKLED):
        return (
            f"{folder} has no {WEIGHTS}; give the folder of an adapter saved with "
            "model.save_pretrained"
        )
    return (
        f"{folder / PICKLED}: is a pickled file, which is never opened here because reading one "
        "can run code. Convert it where you trust it: "
        '`python -c "import torch, safetensors.torch as s; '
        f"s.save_file(torch.load('{PICKLED}', weights_only=True), '{WEIGHTS}')\"`"
    )
