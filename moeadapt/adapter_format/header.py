"""Reads the header of a safetensors file: every tensor's name, type, shape and place, checked.

Layout: 8 bytes little-endian length N, N bytes of JSON, then the numbers; see
https://github.com/huggingface/safetensors#format. The `safetensors` package reads the same; here
each field is checked before anything is allocated, with words, and within bounds of our own.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from moeadapt.adapter_format.settings import load_json
from moeadapt.errors import AdapterFileError

MAX_HEADER = 16 << 20
"""Bytes; 65536 tensors with long names fit."""

MAX_TENSORS = 1 << 16
MAX_DIMENSIONS = 8
MAX_NAME = 500

MAX_NUMBERS = 1 << 48
"""A tensor's; without numbers, the product of its other dimensions: torch multiplies them, too."""

ITEM_SIZES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "F32": 4,
    "I64": 8,
    "F64": 8,
}
"""Type in the header -> bytes of one number: the types that an adapter can have."""

FLOATS = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One tensor of a file.

    Attributes:
        dtype: a key of `ITEM_SIZES`.
        shape: its shape.
        start: first byte, counted from the end of the header.
        end: byte after its last.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Header:
    """The header of a file.

    Attributes:
        tensors: name -> what is said of it.
        raw: the length and the JSON, as they are in the file.
        data_bytes: length of the numbers.
    """

    tensors: dict[str, TensorInfo]
    raw: bytes
    data_bytes: int


def read_header(file: BinaryIO, path: Path) -> Header:
    """Read and check the header; `file` then stands at the numbers.

    Raises:
        AdapterFileError: says what is wrong; only the header was read.
    """
    total = os.fstat(file.fileno()).st_size
    if not total:
        raise AdapterFileError(f"{path}: is empty; {_AGAIN}")
    length = file.read(8)
    size = int.from_bytes(length, "little")
    if len(length) < 8 or size > total - 8:  # noqa: PLR2004
        raise AdapterFileError(
            f"{path}: is cut off or no safetensors file: its header says {size} bytes, and "
            f"{max(total - 8, 0)} follow; {_AGAIN}"
        )
    if size > MAX_HEADER:
        raise AdapterFileError(
            f"{path}: has a header of {size} bytes; at most {MAX_HEADER} are read, enough for "
            f"{MAX_TENSORS} tensors"
        )
    raw = file.read(size)
    _check_count(raw.count(b'"data_offsets"'), path)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise AdapterFileError(f"{path}: its header is not UTF-8: {error}; {_AGAIN}") from None
    if not text.startswith("{"):
        raise AdapterFileError(f"{path}: its header starts with {text[:1]!r}, not '{{'; {_AGAIN}")
    entries = load_json(text, path)
    _check_metadata(entries.pop("__metadata__", {}), path)
    _check_count(len(entries), path)  # the name may have been written with escapes
    tensors = {name: _info(name, entry, path) for name, entry in entries.items()}
    _check_places(tensors, total - 8 - size, path)
    return Header(tensors=tensors, raw=length + raw, data_bytes=total - 8 - size)


_AGAIN = "copy the adapter again from where it was saved"


def _check_count(count: int, path: Path) -> None:
    if count > MAX_TENSORS:
        raise AdapterFileError(
            f"{path}: holds {count} tensors; an adapter has at most {MAX_TENSORS}"
        )


def _check_metadata(metadata: Any, path: Path) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise AdapterFileError(f"{path}: __metadata__ must map strings to strings; {_AGAIN}")


def _info(name: str, entry: Any, path: Path) -> TensorInfo:
    where = f"{path}: tensor {name[:MAX_NAME]!r}"
    if not name or len(name) > MAX_NAME or not name.isprintable() or name != name.strip():
        raise AdapterFileError(
            f"{where}: a name is 1 to {MAX_NAME} printable characters without spaces around it"
        )
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise AdapterFileError(f"{where}: needs exactly dtype, shape and data_offsets; {_AGAIN}")
    dtype, shape, places = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise AdapterFileError(f"{where}: unknown type {dtype!r}; one of {list(ITEM_SIZES)}")
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise AdapterFileError(
            f"{where}: shape {shape!r} must be at most {MAX_DIMENSIONS} integers >= 0"
        )
    if math.prod(size for size in shape if size) >= MAX_NUMBERS:
        raise AdapterFileError(
            f"{where}: shape {shape} is out of range: its dimensions other than 0 must multiply to "
            f"less than {MAX_NUMBERS}; {_AGAIN}"
        )
    if not _are_counts(places) or len(places) != 2 or places[0] > places[1]:  # noqa: PLR2004
        raise AdapterFileError(
            f"{where}: data_offsets {places!r} must be [start, end], start <= end"
        )
    info = TensorInfo(dtype=dtype, shape=tuple(shape), start=places[0], end=places[1])
    if info.size * ITEM_SIZES[dtype] != info.end - info.start:
        raise AdapterFileError(
            f"{where}: shape {shape} of {dtype} is {info.size * ITEM_SIZES[dtype]} bytes, but "
            f"data_offsets hold {info.end - info.start}; {_AGAIN}"
        )
    return info


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _check_places(tensors: dict[str, TensorInfo], data_bytes: int, path: Path) -> None:
    """Require that the tensors fill the rest of the file: no overlap, no hole, nothing after."""
    at = 0
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != at:
            kind = "overlaps the tensor before it" if info.start < at else "leaves a hole before it"
            raise AdapterFileError(
                f"{path}: tensor {name!r} {kind}: starts at byte {info.start}, not {at}; {_AGAIN}"
            )
        at = info.end
    if at != data_bytes:
        kind = "is cut off" if at > data_bytes else "holds bytes of no tensor"
        raise AdapterFileError(
            f"{path}: {kind}: its tensors need {at} bytes, and {data_bytes} follow the header; "
            f"{_AGAIN}"
        )
