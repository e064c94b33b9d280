"""The files of one saved adapter, opened once and read in the order that refuses cheapest."""

import hashlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from moeadapt.adapter_format.files import exists, open_file
from moeadapt.adapter_format.header import Header, TensorInfo, read_header
from moeadapt.adapter_format.manifest import check_sha256, read_manifest
from moeadapt.adapter_format.options import options
from moeadapt.adapter_format.settings import MAX_BYTES, SETTINGS, WEIGHTS, no_weights
from moeadapt.errors import AdapterFileError
from moeadapt.journal import recover

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}

LARGE = 1e12
"""Far above what training gives; products of a few such numbers leave float32."""


class AdapterFiles:
    """A saved adapter of this method, open for reading.

    1. making it checks the settings' sha256, that no other file stands for the weights, and the
       header of the weights;
    2. `header` is compared with what settings and base need, by `match.check_tensors`;
    3. `read` reads the numbers from the same open file and checks them.

    Attributes:
        folder: where it is; a folder of the hub's cache for an adapter of the hub.
        manifest: what was said of it when it was saved; None: nothing.
        header: of the weights.
        tensors: what `read` has read.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open the weights of the adapter in `folder` and read their header.

        Raises:
            AdapterFileError: a file is missing, damaged, or not the one that was saved.
        """
        recover(folder)
        self.folder = Path(folder)
        self.tensors: dict[str, Tensor] = {}
        self._is_read = False
        if not exists(self.folder, WEIGHTS):
            raise AdapterFileError(no_weights(self.folder))
        self.manifest = read_manifest(self.folder)
        if self.manifest is not None:
            with open_file(self.folder, SETTINGS) as file:
                found = hashlib.sha256(file.read(MAX_BYTES + 1)).hexdigest()
            check_sha256(self.manifest, self.folder, SETTINGS, found)
        self._file = open_file(self.folder, WEIGHTS)
        try:
            self.header: Header = read_header(self._file, self.path)
        except BaseException:
            self.close()
            raise

    @property
    def path(self) -> Path:
        """The file of the weights."""
        return self.folder / WEIGHTS

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def read(self) -> dict[str, Tensor]:
        """Return the tensors, on the CPU; read and checked at the first call.

        Raises:
            AdapterFileError: the file is not the one that was saved, or, unless the caller allows
                it, a tensor holds NaN or infinity.
        """
        if self._is_read:
            return self.tensors
        data = bytearray(self.header.data_bytes)
        got = self._file.readinto(data)  # type: ignore[attr-defined]
        if got != len(data) or self._file.read(1):
            raise AdapterFileError(f"{self.path}: changed while it was read; load it again")
        if self.manifest is not None:
            digest = hashlib.sha256(self.header.raw)
            digest.update(data)
            check_sha256(self.manifest, self.folder, WEIGHTS, digest.hexdigest())
        tensors = dict(to_tensors(data, self.header))
        check_values(tensors, self.path)
        self.tensors.update(tensors)
        self._is_read = True
        return self.tensors


def read_numbers(file: BinaryIO, header: Header, path: Path) -> bytearray:
    """Return the bytes behind the header, where `file` stands.

    Raises:
        AdapterFileError: the file is not as long as it was.
    """
    data = bytearray(file.read(header.data_bytes))
    if len(data) < header.data_bytes:
        raise AdapterFileError(f"{path}: changed while it was read; try again")
    return data


def to_tensors(data: bytearray, header: Header) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of what `header` says of the numbers in `data`."""
    for name, info in header.tensors.items():
        yield name, _tensor(data, info)


def _tensor(data: bytearray, info: TensorInfo) -> Tensor:
    dtype = DTYPES[info.dtype]
    if not info.size:
        return torch.empty(info.shape, dtype=dtype)
    part = torch.frombuffer(data, dtype=torch.uint8, count=info.end - info.start, offset=info.start)
    # A copy is aligned, and does not keep the whole file in memory.
    return part.clone().view(dtype).reshape(info.shape)


def check_values(tensors: dict[str, Tensor], path: Path) -> None:
    """Refuse NaN and infinity unless the caller allows them; warn of numbers near the end.

    Raises:
        AdapterFileError: names the tensor and counts the numbers.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        # The model computes in float32 or less: what overflows there is infinite.
        largest = tensor.to(torch.float32).abs().amax()
        if not torch.isfinite(largest):
            _refuse_nonfinite(name, tensor.to(torch.float32), path)
        elif largest > LARGE:
            warnings.warn(
                f"{path}: tensor {name!r} holds {largest.item():g}, and products of such "
                "numbers overflow; the training broke, or the file is damaged",
                stacklevel=2,
            )


def _refuse_nonfinite(name: str, tensor: Tensor, path: Path) -> None:
    if options().allow_nonfinite:
        return
    nan, inf = int(tensor.isnan().sum()), int(tensor.isinf().sum())
    raise AdapterFileError(
        f"{path}: tensor {name!r} holds {nan} NaN and {inf} infinite numbers of {tensor.numel()}: "
        "the training broke, or the file is damaged. Take an earlier checkpoint; to look at it "
        "nevertheless, load it inside moeadapt.loading_options(allow_nonfinite=True)."
    )
