"""What may be kept from one decoding step to the next: casts and packings of frozen matrices.

A step of one token reads every expert's matrices once, so that casting them first would cost more
than using them.
"""

import weakref
from typing import Any

import torch
from torch import Tensor


class Generation:
    """Shared by all banks of a model; holds copies while one KV cache is in use.

    Nothing outlives the KV cache that it was made for, and a matrix that has changed since is cast
    anew. A plain object: it is copied with the model, without what it keeps.
    """

    def __init__(self) -> None:
        """Keep nothing yet."""
        self._cache: weakref.ref[Any] | None = None
        self._kept: dict[Any, tuple[Any, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running generation."""
        return {"_cache": None, "_kept": {}}

    def enter(self, cache: Any) -> None:
        """Start a forward with this KV cache; None: without one, so that nothing is kept."""
        if cache is not None and self._cache is not None and self._cache() is cache:
            return
        self._kept.clear()
        self._cache = None if cache is None else weakref.ref(cache)

    @property
    def keeps(self) -> bool:
        """Whether copies may be made, and used, now."""
        return (
            self._cache is not None
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and self._cache() is not None
        )

    def cast(self, matrix: Tensor, dtype: torch.dtype) -> Tensor:
        """Return `matrix` in `dtype`."""
        if matrix.dtype == dtype:
            return matrix
        return self.pack((matrix,), dtype)

    def pack(self, matrices: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """Return the rows of all `matrices` below each other, in `dtype`."""
        key = (*(id(matrix) for matrix in matrices), dtype)
        state = [(m.data_ptr(), None if m.is_inference() else m._version) for m in matrices]
        kept = self._kept.get(key)
        if kept is None or kept[0] != state:
            kept = (state, torch.cat([matrix.detach().to(dtype) for matrix in matrices]))
            self._kept[key] = kept
        return kept[1]
