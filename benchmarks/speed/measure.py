"""The clock, the turns, and the memory meters.

All forms of one measurement take turns in one process, so that a noisy machine hurts them alike,
and only ratios within a turn are compared. The clock is the process's own CPU time (other processes
do not count) or, on a GPU, CUDA events. Live memory is what tensors hold, seen below autograd, so
it is the same number on every device.
"""

import gc
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

SHORTEST = 0.004
"""Seconds that one timed turn should take at least; shorter work is repeated within the turn."""

MOST_REPEATS = 20


@dataclass
class Measured:
    """One measurement: some forms of the same work, timed in turns.

    Attributes:
        benchmark: which part of the run: `linear`, `ffn`, `llama`, `smollm2`, `import`.
        work: what was timed: `forward`, `forward+backward`, `step`, `decode`, `import`.
        sizes: the sizes and the dtype.
        seconds: form -> seconds of each turn, of the same length for all forms.
        baseline: the form that the ratios of the table are taken to.
        ours: the form of ours that the others are also compared with; empty: none.
        per: how often the work is done within the seconds, such as tokens.
        unit: what one unit of memory is.
        saved: form -> units that autograd keeps for backward, parameters and inputs left out.
        peak: form -> largest units alive at once in forward and backward, what existed before left
            out.
    """

    benchmark: str
    work: str
    sizes: dict[str, Any]
    seconds: dict[str, list[float]]
    baseline: str
    ours: str = ""
    per: int = 1
    unit: str = ""
    saved: dict[str, float] = field(default_factory=dict)
    peak: dict[str, float] = field(default_factory=dict)

    @property
    def rounds(self) -> int:
        """Turns of each form."""
        return len(next(iter(self.seconds.values())))

    def milliseconds(self, form: str) -> float:
        """Return the median time of one piece of work."""
        return 1000 * statistics.median(self.seconds[form]) / self.per

    def ratio(self, form: str, to: str) -> tuple[float, float, float]:
        """Return the median and both quartiles of `form / to` over the turns."""
        pairs = zip(self.seconds[form], self.seconds[to], strict=True)
        return quartiles([mine / theirs for mine, theirs in pairs])


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Return the median, the lower and the upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def seconds_of(work: Callable[[], Any], device: str, repeats: int = 1) -> float:
    """Return the seconds of one call, averaged over `repeats`."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000 / repeats
    begin = time.process_time()
    for _ in range(repeats):
        work()
    return (time.process_time() - begin) / repeats


def in_turns(
    works: Mapping[str, Callable[[], Any]], rounds: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Time every work `rounds` times, round robin, after one untimed turn.

    A form of fractions of a millisecond is repeated within its turn, as often in every turn.
    """
    gc.collect()
    first = {name: max(seconds_of(work, device), 1e-6) for name, work in works.items()}
    repeats = {
        name: min(max(round(SHORTEST / seconds), 1), MOST_REPEATS)
        for name, seconds in first.items()
    }
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            taken[name].append(seconds_of(work, device, repeats[name]))
    return taken


def saved_bytes(forward: Callable[[], Any], known: Iterable[Tensor]) -> int:
    """Return the bytes that autograd keeps for backward, each memory once.

    Args:
        forward: run once with gradients.
        known: parameters and inputs, which exist anyway and are not counted.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            # Or its address could be given to another tensor.
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    total = sum(kept.values())
    del output
    return total


def peak_bytes(work: Callable[[], Any]) -> int:
    """Return the most bytes that tensors made inside `work` hold at once."""
    with _Live() as live:
        work()
    return live.peak


class _Live(TorchDispatchMode):
    """Counts the bytes of every storage that is made under it, until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {_key(t) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in pytree.tree_leaves(out):
            if isinstance(tensor, Tensor) and _key(tensor) not in given | self._alive:
                storage = tensor.untyped_storage()
                self._alive.add(_key(tensor))
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, _key(tensor), storage.nbytes())
        return out

    def _freed(self, key: int, size: int) -> None:
        self.now -= size
        self._alive.discard(key)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
