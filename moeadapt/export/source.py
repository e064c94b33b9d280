"""Reads dense checkpoints tensor by tensor: a folder of safetensors, or a model in memory.

A folder is read with plain file reads, so that memory holds one tensor and no mapped file. Nothing
but safetensors is opened, and no code that a checkpoint brings is run.
"""

import hashlib
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from moeadapt.embedded import resolve_model
from moeadapt.errors import ConfigError
from moeadapt.export.shards import DTYPE_NAMES
from moeadapt.export.writer import INDEX

CHUNK = 1 << 20
"""Bytes read at once while a file is hashed."""

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()} | {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class Source(ABC):
    """Weights by name, and the configuration they belong to."""

    config: PretrainedConfig
    folder: Path | None = None
    """Where tokenizer and generation settings are."""

    @abstractmethod
    def tensors(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return name -> shape and dtype; a tied output head is not listed."""

    @abstractmethod
    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """Return a tensor of its own memory, on the CPU, or some of its rows."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return the SHA-256 of the weights, in hexadecimal."""


@dataclass(frozen=True)
class _Place:
    path: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class FolderSource(Source):
    """A checkpoint folder: config.json, and one or more safetensors files."""

    def __init__(self, folder: str | Path) -> None:
        """Read configuration and headers, no weights.

        Raises:
            ConfigError: there is no such folder, configuration or weights, or a file is damaged.
        """
        self.folder = Path(folder)
        if not (self.folder / "config.json").is_file():
            raise ConfigError(f"{folder} holds no config.json; name a checkpoint folder")
        try:
            self.config = AutoConfig.from_pretrained(self.folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{folder}/config.json: {error}") from error
        self.files = _files(self.folder)
        self._places: dict[str, _Place] = {}
        for path in self.files:
            self._places.update(_places(path))
        if self.config.tie_word_embeddings:
            self._places.pop("lm_head.weight", None)

    def tensors(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """See `Source.tensors`."""
        return {name: (place.shape, place.dtype) for name, place in self._places.items()}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """See `Source.read`.

        Raises:
            ConfigError: the checkpoint has no such tensor, or its file ends early.
        """
        if name not in self._places:
            raise ConfigError(f"{self.folder} has no tensor {name!r}")
        place = self._places[name]
        shape, start = place.shape, place.start
        if rows is not None:
            start += rows[0] * math.prod(shape[1:]) * place.dtype.itemsize
            shape = (rows[1] - rows[0], *shape[1:])
        value = torch.empty(shape, dtype=place.dtype)
        if value.numel():
            raw = value.reshape(-1).view(torch.uint8).numpy().data
            with open(place.path, "rb", buffering=0) as file:
                file.seek(start)
                while len(raw):
                    count = file.readinto(raw)
                    if not count:
                        raise ConfigError(f"{place.path} ends inside {name}; fetch it again")
                    raw = raw[count:]
        return value

    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        return hash_files(self.files)


class ModelSource(Source):
    """A dense model in memory."""

    def __init__(self, model: PreTrainedModel, folder: str | Path | None = None) -> None:
        """Hold the model; `folder` is where its tokenizer is.

        Raises:
            ConfigError: a weight is not in floating point (a quantised model).
        """
        self.config = model.config
        self.folder = None if folder is None else Path(folder)
        self._state = {name: value.detach() for name, value in model.state_dict().items()}
        if self.config.tie_word_embeddings:
            self._state.pop("lm_head.weight", None)
        packed = [name for name, value in self._state.items() if not value.is_floating_point()]
        if packed:
            raise ConfigError(f"{packed[0]} is quantised; load the base in bfloat16 or float32")

    def tensors(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """See `Source.tensors`."""
        return {name: (tuple(value.shape), value.dtype) for name, value in self._state.items()}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """See `Source.read`.

        Raises:
            ConfigError: the model has no such tensor.
        """
        if name not in self._state:
            raise ConfigError(f"the model has no tensor {name!r}")
        value = self._state[name]
        return (value if rows is None else value[rows[0] : rows[1]]).cpu().clone()

    def fingerprint(self) -> str:
        """See `Source.fingerprint`."""
        digest = hashlib.sha256()
        for name in sorted(self._state):
            digest.update(name.encode())
            value = self._state[name].cpu().contiguous().reshape(-1)
            digest.update(memoryview(value.view(torch.uint8).numpy()))
        return digest.hexdigest()


def open_source(base: "str | Path | PreTrainedModel | Source") -> Source:
    """Return a reader of a checkpoint folder, of an `embedded:` model or of a model in memory.

    Raises:
        ConfigError: see `FolderSource` and `ModelSource`.
        AssetError: see `resolve_model`.
    """
    if isinstance(base, Source):
        return base
    if isinstance(base, str):
        base = Path(resolve_model(base))
    return FolderSource(base) if isinstance(base, os.PathLike) else ModelSource(base)


def hash_files(paths: list[Path]) -> str:
    """Return the SHA-256 of the files' names and bytes, in hexadecimal."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise ConfigError(f"{index} is damaged: {error!r}") from error
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise ConfigError(f"{index} names files outside its folder: {sorted(outside)}")
    else:
        names = {"model.safetensors"}
    paths = [folder / name for name in sorted(names)]
    lacking = [path.name for path in paths if not path.is_file()]
    if lacking:
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"; {pickled[0]} is a pickle, which can run code: convert it" if pickled else ""
        raise ConfigError(f"{folder} lacks {lacking}{hint}")
    return paths


def _places(path: Path) -> dict[str, _Place]:
    try:
        # the reference reader checks that offsets, shapes and the file's length agree
        with safe_open(path, "pt") as checked:
            names = set(checked.keys())
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is damaged: {error}") from error
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    places = {}
    for name in names:
        entry = header[name]
        if entry["dtype"] not in _DTYPES:
            raise ConfigError(f"{path}: {name} has dtype {entry['dtype']}, which cannot be read")
        start = 8 + length + entry["data_offsets"][0]
        places[name] = _Place(path, start, tuple(entry["shape"]), _DTYPES[entry["dtype"]])
    return places
