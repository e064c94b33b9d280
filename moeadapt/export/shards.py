"""Which tensors a new checkpoint has, and into which file each of them goes.

Sizes are known before the first byte is written: a file's header is written first, and every matrix
then goes straight to its place, in any order, without a file in memory.
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from moeadapt.errors import ConfigError, ExportError
from moeadapt.export.targets.base import Fill, Target

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
"""Floating point types and what safetensors calls them."""

WRITABLE = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the new checkpoint."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """One file: its tensors in order, the header, and where each tensor starts in the file."""

    file: str
    tensors: tuple[PlannedTensor, ...]
    header: bytes
    starts: Mapping[str, int]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


def plan(
    target: Target,
    dense: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    dtype: torch.dtype | None = None,
) -> list[PlannedTensor]:
    """Return every tensor of a mixture, layer by layer.

    Args:
        target: the class to write.
        dense: name -> shape and dtype of each tensor of the dense checkpoint.
        dtype: of the new tensors; None keeps that of the dense ones.

    Raises:
        ConfigError: `dtype` is not one of `WRITABLE`, or a base tensor is no floating point one.
    """
    if dtype is not None and dtype not in WRITABLE:
        raise ConfigError(f"dtype {dtype}: one of {list(WRITABLE)}")
    found: dict[str, PlannedTensor] = {}

    def add(name: str, shape: tuple[int, ...], kind: torch.dtype) -> None:
        known = found.setdefault(name, PlannedTensor(name, shape, kind))
        assert known.shape == shape, f"{name}: {known.shape} and {shape}"

    for name, (shape, own) in dense.items():
        if own not in DTYPE_NAMES:
            raise ConfigError(
                f"{name} is {own}; a mixture is written from floating point weights: load the "
                "unquantised base"
            )
        for copy in target.copies(name):
            rows = shape if copy.rows is None else (copy.rows[1] - copy.rows[0], *shape[1:])
            add(copy.name, rows, dtype or own)
    usual = dtype or common_dtype(dense)
    for layer in target.moe_layers():
        for place in target.places(layer):
            add(place.name, place.shape, usual)
        for fill in target.fills(layer):
            add(fill.name, fill.shape, fill_dtype(fill, usual))
    return sorted(found.values(), key=_order)


def fill_dtype(fill: Fill, usual: torch.dtype) -> torch.dtype:
    """Return the dtype on disk of a constant tensor."""
    return torch.float32 if fill.exact else usual


def common_dtype(dense: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> torch.dtype:
    """Return the dtype that holds most of the numbers."""
    counts: dict[torch.dtype, int] = {}
    for shape, dtype in dense.values():
        counts[dtype] = counts.get(dtype, 0) + math.prod(shape)
    return max(counts, key=lambda dtype: counts[dtype])


def _order(tensor: PlannedTensor) -> tuple[int, str]:
    parts = tensor.name.split(".")
    in_layer = parts[:2] == ["model", "layers"]
    return (int(parts[2]) if in_layer else -1), tensor.name


def shards(tensors: Iterable[PlannedTensor], max_shard_bytes: int) -> list[Shard]:
    """Deal tensors to files of at most `max_shard_bytes`; a larger tensor has a file of its own.

    Raises:
        ConfigError: `max_shard_bytes` is below 1.
        ExportError: two tensors have one name.
    """
    if max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes={max_shard_bytes}: at least 1")
    groups: list[list[PlannedTensor]] = [[]]
    names: set[str] = set()
    held = 0
    for tensor in tensors:
        if tensor.name in names:
            raise ExportError(f"{tensor.name} is planned twice")
        names.add(tensor.name)
        if groups[-1] and held + tensor.nbytes > max_shard_bytes:
            groups.append([])
            held = 0
        groups[-1].append(tensor)
        held += tensor.nbytes
    count = len(groups)
    if count == 1:
        return [_shard("model.safetensors", groups[0])]
    return [
        _shard(f"model-{i:05d}-of-{count:05d}.safetensors", group)
        for i, group in enumerate(groups, 1)
    ]


def _shard(file: str, tensors: list[PlannedTensor]) -> Shard:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset, starts = 0, {}
    # the format wants tensors aligned to their size: wide types first keeps it so
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    for tensor in tensors:
        starts[tensor.name] = offset
        entries[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    return Shard(file, tuple(tensors), header, {n: len(header) + s for n, s in starts.items()})
