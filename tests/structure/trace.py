"""What a piece of code asks of the device: its kernels, their sizes, the bytes kept for backward.

Counted, not timed, so the numbers are the same on every machine.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

SYNCHRONISING = {"nonzero", "item", "_local_scalar_dense", "sort", "unique", "_unique2"}
MATRIX_PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm"}
NO_KERNEL = {"_unsafe_view", "detach", "alias", "lift_fresh"}


@dataclass(frozen=True)
class Kernel:
    """One operation: its name, and what went in and came out."""

    name: str
    inputs: tuple[Tensor, ...] = field(repr=False)
    outputs: tuple[Tensor, ...] = field(repr=False)

    @property
    def size(self) -> int:
        """Elements of the largest output."""
        return max((t.numel() for t in self.outputs), default=0)


def _tensors(tree: Any) -> tuple[Tensor, ...]:
    return tuple(leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))


def _is_view(func: Any) -> bool:
    returned = [r.alias_info for r in func._schema.returns]
    return bool(returned) and all(info is not None and not info.is_write for info in returned)


class Recorder(TorchDispatchMode):
    """Lists every operation below autograd that is not a view."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        outputs = _tensors(out)
        launches = outputs or name in SYNCHRONISING
        if launches and not _is_view(func) and name not in NO_KERNEL:
            self.kernels.append(Kernel(name, _tensors((args, kwargs)), outputs))
        return out


@contextmanager
def recorded() -> Iterator[list[Kernel]]:
    """List the kernels launched inside the `with` block."""
    with Recorder() as recorder:
        yield recorder.kernels


def names(kernels: list[Kernel]) -> list[str]:
    """Return the names in order."""
    return [kernel.name for kernel in kernels]


def saved_for_backward(run: Callable[[], Any], known: list[Tensor]) -> list[Tensor]:
    """Return what `run` keeps for backward, each memory once, without that of `known`."""
    seen = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage().data_ptr()
        if memory not in seen:
            seen.add(memory)
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = run()
    del alive
    return kept
