"""Writes a checkpoint matrix by matrix into a hidden folder that gets its name only when complete.

Steps: 1. remove what a killed run left; 2. refuse an occupied folder or a full disk; 3. write the
headers of all files; 4. put every matrix in its place; 5. refuse to finish while a byte is missing;
6. flush to disk and rename.
"""

import fcntl
import glob
import json
import os
import shutil
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from moeadapt.errors import ConfigError, ExportError
from moeadapt.export.shards import Shard, Tensor, shards
from moeadapt.export.targets.base import Slot

INDEX = "model.safetensors.index.json"
SPARE_BYTES = 1 << 20
"""For configuration, tokenizer and receipt."""

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
"""Files of a base that go along unchanged."""

DEFAULT_SHARD_BYTES = 5_000_000_000


class CheckpointWriter:
    """A checkpoint in the making: a context that leaves nothing behind unless `finish` was called.

    Example:
        >>> with CheckpointWriter(out_dir, tensors) as writer:
        ...     writer.write("model.norm.weight", weight)
        ...     writer.write_json("config.json", config.to_dict())
        ...     writer.finish()
    """

    def __init__(
        self, out_dir: str | Path, tensors: list[Tensor], max_shard_bytes: int = DEFAULT_SHARD_BYTES
    ) -> None:
        """Check the place and lay out the files; writes nothing.

        Hidden folders of the same name whose process is gone are removed.

        Raises:
            ConfigError: `out_dir` exists and is not an empty folder, the disk has too little room,
                or `max_shard_bytes` is below 1.
        """
        self.out_dir = Path(os.path.abspath(out_dir))
        self._shards = shards(tensors, max_shard_bytes)
        self._home: dict[str, tuple[Shard, Tensor]] = {
            tensor.name: (shard, tensor) for shard in self._shards for tensor in shard.tensors
        }
        self._missing = {tensor.name: tensor.nbytes for tensor in tensors}
        self.nbytes = sum(shard.nbytes for shard in self._shards)
        remove_leftovers(self.out_dir)
        check_place(self.out_dir, self.nbytes)
        self.folder = self.out_dir.parent / f".{self.out_dir.name}.partial-{uuid.uuid4().hex[:8]}"
        self._files: dict[str, int] = {}
        self._lock: int | None = None
        self._finished = False

    def __enter__(self) -> "CheckpointWriter":
        """Create the hidden folder and the files, headers only."""
        self.out_dir.parent.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir()
        self._lock = _lock(self.folder)
        for shard in self._shards:
            path = self.folder / shard.file
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            self._files[shard.file] = file
            _pwrite(file, memoryview(shard.header), 0)
            os.truncate(file, shard.nbytes)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the hidden folder unless the checkpoint was finished."""
        self._close()
        if not self._finished:
            shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)

    def _close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def write(self, name: str, value: torch.Tensor) -> int:
        """Write a whole tensor, cast to its dtype on disk; return its bytes.

        Raises:
            ExportError: it is not planned, has another shape, was written before, or is not finite.
        """
        return self.write_matrix(Slot(name, tuple(value.shape), (0, 0)), value)

    def write_matrix(self, slot: Slot, value: torch.Tensor) -> int:
        """Write one matrix of a tensor; return its bytes.

        Raises:
            ExportError: see `write`.
        """
        if slot.name not in self._home:
            raise ExportError(f"{slot.name} is not part of the planned checkpoint")
        shard, tensor = self._home[slot.name]
        expected = tensor.shape if slot.matrix == (0, 0) else slot.matrix
        if slot.shape != tensor.shape or tuple(value.shape) != tuple(expected):
            raise ExportError(
                f"{slot.name}: {tuple(value.shape)} of {slot.shape} for {tensor.shape} on disk"
            )
        data = value.detach().to(device="cpu", dtype=tensor.dtype).contiguous()
        if not torch.isfinite(data).all():
            raise ExportError(f"{slot.name} holds NaN or infinity in {tensor.dtype}")
        size = data.numel() * tensor.dtype.itemsize
        if size > self._missing[slot.name]:
            raise ExportError(f"{slot.name} was written before")
        raw = data.reshape(-1).view(torch.uint8).numpy().data if size else memoryview(b"")
        start = shard.starts[slot.name] + slot.start * tensor.dtype.itemsize
        _pwrite(self._files[shard.file], raw, start)
        self._missing[slot.name] -= size
        return size

    def write_json(self, file: str, content: Any) -> None:
        """Write a JSON file beside the weights."""
        text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"
        (self.folder / file).write_text(text, encoding="utf-8")

    def copy_companions(self, folder: str | Path) -> None:
        """Copy tokenizer and generation settings of a base, where it has them."""
        for file in COMPANIONS:
            if (Path(folder) / file).is_file():
                shutil.copyfile(Path(folder) / file, self.folder / file)

    def complete(self) -> None:
        """Close the weights, so that the hidden folder can be loaded and checked.

        Raises:
            ExportError: a tensor is missing or not whole.
        """
        lacking = sorted(name for name, left in self._missing.items() if left)
        if lacking:
            raise ExportError(f"{len(lacking)} tensors were not written, first {lacking[:3]}")
        if len(self._shards) > 1:
            weight_map = {name: shard.file for name, (shard, _) in self._home.items()}
            total = sum(tensor.nbytes for _, tensor in self._home.values())
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            self.write_json(INDEX, index)
        self._close()

    def finish(self) -> Path:
        """Flush everything to disk and give the folder its name.

        Raises:
            ExportError: a tensor is missing, or the place was taken in the meantime.
        """
        self.complete()
        for path in (*sorted(self.folder.iterdir()), self.folder):
            _sync(path)
        try:
            os.rename(self.folder, self.out_dir)
        except OSError as error:
            raise ExportError(f"{self.out_dir} was taken while it was written: {error}") from error
        self._finished = True
        _sync(self.out_dir.parent)
        return self.out_dir


def remove_leftovers(out_dir: Path) -> None:
    """Remove the hidden folders that killed runs left beside `out_dir`; not those in use."""
    for folder in out_dir.parent.glob(f".{glob.escape(out_dir.name)}.partial-*"):
        lock = _lock(folder)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Return an open file that locks `folder` while its process lives; None if another has it."""
    file = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        return None
    return file


def check_place(out_dir: Path, nbytes: int) -> None:
    """Check that `out_dir` is free and its disk has room.

    Raises:
        ConfigError: it is occupied, or there is too little room.
    """
    if out_dir.exists() and not (out_dir.is_dir() and not any(out_dir.iterdir())):
        raise ConfigError(f"{out_dir} exists; name a new folder or empty it")
    parent = out_dir.parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    needed = nbytes + SPARE_BYTES
    if free < needed:
        raise ConfigError(
            f"{out_dir} needs {needed / 1e9:.2f} GB and {parent} has {free / 1e9:.2f} GB free"
        )


def _pwrite(file: int, data: memoryview, start: int) -> None:
    data = data.cast("B")
    while len(data):
        written = os.pwrite(file, data, start)
        data, start = data[written:], start + written


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
