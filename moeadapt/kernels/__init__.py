"""Optional Triton kernels, and when they may run: asked for, or proven on that kind of GPU.

Every kernel has a PyTorch form that needs nothing, so leaving Triton out loses no feature. Triton
is imported only when a kernel runs.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from moeadapt.errors import UnsupportedError

KernelName = Literal["mix_activation", "top_k_gate"]

PROVEN: frozenset[tuple[KernelName, tuple[int, int]]] = frozenset()
"""Kernel and compute capability of the GPUs that use it unasked.

Empty: the kernels have run in Triton's interpreter only. An entry is made only when the tests
marked `gpu` have passed on a GPU of that capability and the rows that show what the kernel gains
there are committed in benchmarks/results.
"""

LEAST_CAPABILITY = (8, 0)
"""Oldest GPUs the kernels are written for: those with bfloat16 matrix products."""

_INSTALL = "pip install 'moeadapt[kernels]'"
_asked = 0


def interpreted() -> bool:
    """Whether Triton runs kernels on the CPU, one operation at a time: to check numbers only."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def unavailable(device: torch.device) -> str | None:
    """Return why the kernels cannot run on `device`, or None if they can.

    Example:
        >>> unavailable(torch.device("cpu"))
        'they run on NVIDIA GPUs only, and the device is cpu'
    """
    if find_spec("triton") is None:
        return f"Triton is not installed: {_INSTALL}"
    if device.type == "cpu" and interpreted():
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"they run on NVIDIA GPUs only, and the device is {device}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if _capability(device) < LEAST_CAPABILITY:
        least, found = (
            f"{major}.{minor}" for major, minor in (LEAST_CAPABILITY, _capability(device))
        )
        return f"they need compute capability {least}, and {device} has {found}"
    return None


def require(device: torch.device) -> None:
    """Refuse a device that the kernels cannot run on.

    Raises:
        UnsupportedError: says why not.
    """
    reason = unavailable(device)
    if reason is not None:
        raise UnsupportedError(
            f"the Triton kernels cannot run: {reason}; leave out moeadapt.kernels.enabled() to "
            "compute the same in PyTorch"
        )


@contextmanager
def enabled(device: torch.device | str = "cuda") -> Iterator[None]:
    """Use every kernel within the block, proven or not, in all threads.

    Forward and backward must both be inside where gradient checkpointing computes a forward again:
    the second forward has to keep what the first one kept.

    Args:
        device: where the model is.

    Raises:
        UnsupportedError: the kernels cannot run on `device`; says why not.
    """
    global _asked
    require(torch.device(device))
    _asked += 1
    try:
        yield
    finally:
        _asked -= 1


def use(kernel: KernelName, tensor: Tensor) -> bool:
    """Whether `kernel` shall compute what concerns `tensor`: asked for, or proven on its device.

    Raises:
        UnsupportedError: the kernels were asked for, and cannot run on the tensor's device.
    """
    if _asked:
        require(tensor.device)
        return True
    if not PROVEN or unavailable(tensor.device) is not None or not tensor.is_cuda:
        return False
    return (kernel, _capability(tensor.device)) in PROVEN


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
