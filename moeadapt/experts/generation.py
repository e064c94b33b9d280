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

    Nothing outlives the KV cache that it was made for or the next prompt, and a matrix that was
    replaced or changed in place is cast anew. A change through `.data` between two steps of one
    answer cannot be seen: call `forget` after it, and also before a prompt of one token in a KV
    cache that was emptied and is used again. A plain object: it is copied with the model, without
    what it keeps.

    Attributes:
        answer: number of the answer that is being generated; a copy counts anew.
    """

    def __init__(self) -> None:
        """Keep nothing yet."""
        self._cache: weakref.ref[Any] | None = None
        self._kept: dict[Any, _Kept] = {}
        self.answer = 0
        self._decodes = False

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running generation."""
        return {"_cache": None, "_kept": {}, "answer": -1, "_decodes": False}

    def enter(self, cache: Any, tokens: int = 1) -> None:
        """Start a forward.

        Args:
            cache: the KV cache; None: there is none, so that nothing is kept.
            tokens: of each row; more than one are a prompt, which starts anew.
        """
        same = cache is not None and self._cache is not None and self._cache() is cache
        self._decodes = same and tokens == 1
        if self._decodes:
            return
        self.forget()
        try:
            self._cache = None if cache is None else weakref.ref(cache, lambda _: self.forget())
        except TypeError:  # some types cannot be followed, such as a list
            self._cache = None

    def forget(self) -> None:
        """Drop every copy."""
        self._kept.clear()
        self.answer = 0

    @property
    def decodes(self) -> bool:
        """Whether the running forward adds a token to an answer."""
        return self._decodes and self.keeps

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
        kept = self._kept.get(key)
        if kept is not None and kept.is_of(matrices):
            return kept.packed
        packed = torch.cat([matrix.detach().to(dtype) for matrix in matrices])
        # Inference tensors do not tell when they change.
        if not any(matrix.is_inference() for matrix in matrices):
            self._kept[key] = _Kept(matrices, packed)
        return packed


class _Kept:
    """A copy, and what it was made from: an id alone may be given to another tensor later."""

    def __init__(self, matrices: tuple[Tensor, ...], packed: Tensor) -> None:
        self.packed = packed
        self._sources = [weakref.ref(matrix) for matrix in matrices]
        self._state = [(m.data_ptr(), m._version) for m in matrices]

    def is_of(self, matrices: tuple[Tensor, ...]) -> bool:
        """Whether these are the same matrices, unchanged."""
        same = all(ref() is m for ref, m in zip(self._sources, matrices, strict=True))
        return same and self._state == [(m.data_ptr(), m._version) for m in matrices]
