"""The tokens of one chunk in one slot, each multiplied by the ranks of its own expert.

`MaskedRows` multiplies the ranks of all experts with zeros where they are not the token's own: all
shapes are static, which is what a GPU wants. `SortedRows` sorts the tokens by expert and multiplies
only what is needed, with sizes read on the host: less work, for a CPU.

Letters: T tokens, C tokens of the chunk, F width of the FFN, R width of a rank axis.
"""

from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moeadapt.kernels.reference import SHARED, owned


class SlotRows(Protocol):
    """What the mixing of activations asks for; every result is in an order of its own."""

    def take(self, values: Float[Tensor, "T ..."]) -> Float[Tensor, "C ..."]:
        """Return the chunk's rows in this order; not to be written to."""
        ...

    def restore(self, rows: Float[Tensor, "C ..."]) -> Float[Tensor, "C ..."]:
        """Return rows in the order of the tokens."""
        ...

    def expand(
        self,
        onto: Float[Tensor, "T F"],
        hidden: Float[Tensor, "C R"],
        matrix: Float[Tensor, "F R"],
        columns: "Columns",
    ) -> Float[Tensor, "C F"]:
        """Return `take(onto) + hidden_own @ matrix.T`, in memory of its own."""
        ...

    def contract(
        self, rows: Float[Tensor, "C F"], matrix: Float[Tensor, "F R"], columns: "Columns"
    ) -> Float[Tensor, "C R"]:
        """Return `rows @ matrix`, zero outside each token's own ranks."""
        ...

    def accumulate(
        self,
        total: Float[Tensor, "F R"],
        rows: Float[Tensor, "C F"],
        hidden: Float[Tensor, "C R"],
        columns: "Columns",
    ) -> None:
        """Add `rows.T @ hidden_own` to `total`."""
        ...


class Columns:
    """Which expert each rank of a rank axis belongs to.

    Attributes:
        owner: expert of each rank, on the device; `SHARED` for shared experts.
        spans: where the ranks of each routed expert lie.
        always: where those of all shared experts lie.
    """

    def __init__(self, routed: tuple[int, ...], shared: int, device: torch.device) -> None:
        """Lay out the ranks of each routed expert, then `shared` ranks of shared ones."""
        ends = list(accumulate(routed, initial=0))
        self.spans = [slice(a, b) for a, b in pairwise(ends)]
        self.always = slice(ends[-1], ends[-1] + shared)
        owners = [e for e, rank in enumerate(routed) for _ in range(rank)]
        self.owner = torch.tensor(owners + [SHARED] * shared, device=device)


class MaskedRows:
    """See `SlotRows`: in the order of the tokens."""

    def __init__(self, ids: Int[Tensor, " C"], own: slice) -> None:
        """Take the tokens `own`, whose experts are `ids`; -1: none."""
        self._ids, self._own = ids, own

    def _only(self, hidden: Tensor, columns: Columns) -> Tensor:
        # Not a product: what other experts hold may be infinite.
        return torch.where(owned(columns.owner, self._ids), hidden, hidden.new_zeros(()))

    def take(self, values: Tensor) -> Tensor:
        """See `SlotRows.take`."""
        return values[self._own]

    def restore(self, rows: Tensor) -> Tensor:
        """See `SlotRows.restore`."""
        return rows

    def expand(self, onto: Tensor, hidden: Tensor, matrix: Tensor, columns: Columns) -> Tensor:
        """See `SlotRows.expand`."""
        return torch.addmm(onto[self._own], self._only(hidden, columns), matrix.t())

    def contract(self, rows: Tensor, matrix: Tensor, columns: Columns) -> Tensor:
        """See `SlotRows.contract`."""
        return self._only(rows @ matrix, columns)

    def accumulate(self, total: Tensor, rows: Tensor, hidden: Tensor, columns: Columns) -> None:
        """See `SlotRows.accumulate`."""
        total += rows.t() @ self._only(hidden, columns)


class SortedRows:
    """See `SlotRows`: in the order of the experts."""

    def __init__(self, ids: Int[Tensor, " C"], own: slice) -> None:
        """Take the tokens `own`, whose experts are `ids`; -1: none."""
        sorted_ids, self._order = ids.sort(stable=True)
        self._own, self._back = own, self._order.argsort()
        experts, counts = torch.unique_consecutive(sorted_ids, return_counts=True)
        ends = list(accumulate(counts.tolist(), initial=0))
        self._parts = [
            (expert, slice(a, b))
            for expert, (a, b) in zip(experts.tolist(), pairwise(ends), strict=True)
        ]

    def _blocks(self, columns: Columns) -> Iterator[tuple[slice, slice]]:
        """Return which rows use which ranks."""
        yield from ((rows, columns.spans[e]) for e, rows in self._parts if e >= 0)
        if columns.always.start < columns.always.stop:
            yield slice(None), columns.always

    def take(self, values: Tensor) -> Tensor:
        """See `SlotRows.take`."""
        return values[self._own].index_select(0, self._order)

    def restore(self, rows: Tensor) -> Tensor:
        """See `SlotRows.restore`."""
        return rows.index_select(0, self._back)

    def expand(self, onto: Tensor, hidden: Tensor, matrix: Tensor, columns: Columns) -> Tensor:
        """See `SlotRows.expand`."""
        out = self.take(onto)
        for rows, ranks in self._blocks(columns):
            out[rows].addmm_(hidden[rows, ranks], matrix[:, ranks].t())
        return out

    def contract(self, rows: Tensor, matrix: Tensor, columns: Columns) -> Tensor:
        """See `SlotRows.contract`."""
        out = rows.new_zeros(rows.shape[0], matrix.shape[1])
        for own, ranks in self._blocks(columns):
            out[own, ranks] = rows[own] @ matrix[:, ranks]
        return out

    def accumulate(self, total: Tensor, rows: Tensor, hidden: Tensor, columns: Columns) -> None:
        """See `SlotRows.accumulate`."""
        for own, ranks in self._blocks(columns):
            total[:, ranks] += rows[own].t() @ hidden[own, ranks]
