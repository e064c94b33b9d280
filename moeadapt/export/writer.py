"""Writes a checkpoint matrix by matrix into a hidden folder that gets its name only when complete.

Steps: 1. remove what a killed run left; 2. refuse an occupied folder or a full disk; 3. write the
headers of all files; 4. put every matrix in its place; 5. refuse to finish while a byte is missing;
6. flush to disk and rename.
"""

import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from moeadapt.errors import ExportError
from moeadapt.export.shards import PlannedTensor, Shard, shards
from moeadapt.export.targets.base import Place
from moeadapt.hidden_folder import (
    HiddenFolder,
    check_folder,
    remove_leftovers,
    writing,
)
from moeadapt.tokenizer_files import TOKENIZER_FILES

INDEX = "model.safetensors.index.json"
SPARE_BYTES = 1 << 20
"""For configuration, tokenizer and receipt."""

COMPANIONS = (*TOKENIZER_FILES, "generation_config.json")
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
        self,
        out_dir: str | Path,
        tensors: list[PlannedTensor],
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    ) -> None:
        """Check the place and lay out the files; writes nothing.

        Hidden folders of the same name whose process is gone are removed.

        Raises:
            ConfigError: `out_dir` exists and is not an empty folder, the disk has too little room,
                or `max_shard_bytes` is below 1.
        """
        self.out_dir = Path(os.path.abspath(out_dir))
        self._shards = shards(tensors, max_shard_bytes)
        self._home: dict[str, tuple[Shard, PlannedTensor]] = {
            tensor.name: (shard, tensor) for shard in self._shards for tensor in shard.tensors
        }
        self._missing = {tensor.name: tensor.nbytes for tensor in tensors}
        self._written: dict[str, list[tuple[int, int]]] = {}
        self.nbytes = sum(shard.nbytes for shard in self._shards)
        remove_leftovers(self.out_dir)
        check_folder(self.out_dir, self.nbytes + SPARE_BYTES)
        self._hidden = HiddenFolder(self.out_dir)
        self._files: dict[str, int] = {}

    def __enter__(self) -> "CheckpointWriter":
        """Create the hidden folder and the files, headers only.

        Raises:
            ExportError: the disk does not take them; nothing is left behind.
        """
        try:
            self._hidden.make()
            for shard in self._shards:
                path = self.folder / shard.file
                with writing(path):
                    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
                    self._files[shard.file] = file
                    _pwrite(file, memoryview(shard.header), 0)
                    os.truncate(file, shard.nbytes)
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the hidden folder unless the checkpoint was finished."""
        self._leave()

    def _leave(self) -> None:
        self._close()
        self._hidden.leave()

    @property
    def folder(self) -> Path:
        """The hidden folder."""
        return self._hidden.path

    def _close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def write(self, name: str, value: torch.Tensor) -> int:
        """Write a whole tensor, cast to its dtype on disk; return its bytes.

        Raises:
            ExportError: it is not planned, has another shape, was written before, or is not finite,
                or the disk does not take it.
        """
        return self.write_matrix(Place(name, tuple(value.shape), (0, 0)), value)

    def write_matrix(self, place: Place, value: torch.Tensor) -> int:
        """Write one matrix of a tensor; return its bytes.

        Raises:
            ExportError: see `write`.
        """
        if place.name not in self._home:
            raise ExportError(f"{place.name} is not part of the planned checkpoint")
        shard, tensor = self._home[place.name]
        expected = tensor.shape if place.matrix == (0, 0) else place.matrix
        if place.shape != tensor.shape or tuple(value.shape) != tuple(expected):
            raise ExportError(
                f"{place.name}: {tuple(value.shape)} of {place.shape} for {tensor.shape} on disk"
            )
        data = value.detach().to(device="cpu", dtype=tensor.dtype).contiguous()
        if not torch.isfinite(data).all():
            raise ExportError(f"{place.name} holds NaN or infinity in {tensor.dtype}")
        size = data.numel() * tensor.dtype.itemsize
        start = place.start * tensor.dtype.itemsize
        end = start + size
        if not 0 <= start <= end <= tensor.nbytes:
            raise ExportError(f"{place.name}: a matrix at {place.start} is outside {tensor.shape}")
        written = self._written.setdefault(place.name, [])
        if any(start < other_end and other_start < end for other_start, other_end in written):
            raise ExportError(f"{place.name}: the matrix at {place.start} was written before")
        raw = data.reshape(-1).view(torch.uint8).numpy().data if size else memoryview(b"")
        with writing(self.folder / shard.file):
            _pwrite(self._files[shard.file], raw, shard.starts[place.name] + start)
        written.append((start, end))
        self._missing[place.name] -= size
        return size

    def write_json(self, file: str, content: Any) -> None:
        """Write a JSON file beside the weights.

        Raises:
            ExportError: the disk does not take it.
        """
        text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"
        with writing(self.folder / file):
            (self.folder / file).write_text(text, encoding="utf-8")

    def copy_companions(self, folder: str | Path) -> None:
        """Copy tokenizer and generation settings of a base, where it has them.

        Raises:
            ExportError: one cannot be read, or the disk does not take it.
        """
        for file in COMPANIONS:
            if (Path(folder) / file).is_file():
                with writing(self.folder / file):
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
            ExportError: a tensor is missing, the place was taken in the meantime, or the disk does
                not take everything.
        """
        self.complete()
        self._hidden.finish()
        return self.out_dir


def _pwrite(file: int, data: memoryview, start: int) -> None:
    """Write all of `data` at byte `start` of an open file."""
    data = data.cast("B")
    while len(data):
        written = os.pwrite(file, data, start)
        data, start = data[written:], start + written
