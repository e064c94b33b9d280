"""One adapter's routing of one running block, and what the block's linears share of it.

Letters: T tokens, D width of the block's input, E experts, N routed and shared experts, S linears
that read the block's input, R width of their rank axes.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from moeadapt.dispatch import Slots, choose, dispatch
from moeadapt.experts import ExpertBank
from moeadapt.experts.lora import LoraBank
from moeadapt.tuner.head import RouterHead

if TYPE_CHECKING:
    from moeadapt.tuner.layer import MoeLoraLinear


class BlockRouting:
    """Lives from the block's entry to its end.

    Attributes:
        weights: routing weights of the block's tokens.
        input: what was routed, the very tensor that the block was called with.
    """

    def __init__(
        self,
        adapter: str,
        head: RouterHead,
        weights: Float[Tensor, "T E"],
        source: Tensor,
        readers: "Sequence[MoeLoraLinear]",
    ) -> None:
        """Take the routing of `source`.

        Args:
            adapter: its name.
            head: what routed.
            weights: what it returned.
            source: the block's input.
            readers: the targeted linears that are expected to read `source`.
        """
        self.weights, self.input = weights, source
        self._version = _version(source)
        self._adapter, self._head, self._readers = adapter, head, readers
        self._slots: Slots | None = None
        self._scaled: dict[tuple[float, int, torch.dtype], Tensor] = {}
        self._hidden: dict[int, Tensor] | None = None
        self._gated: dict[int, Tensor] | None = None
        self._tokens: Tensor | None = None
        self._banks: list[ExpertBank] = []
        self._all_hidden: Tensor | None = None

    @property
    def max_active(self) -> int:
        """Upper bound on the experts of one token."""
        return self._head.max_active

    @property
    def slots(self) -> Slots:
        """The routing as slots, for experts that span an FFN, made once."""
        if self._slots is None:
            sums_to_one = self._head.sums_to_one
            self._slots = Slots.of(self.weights, self.max_active, sums_to_one=sums_to_one)
        return self._slots

    def tokens(self, source: Tensor, flatten: Callable[[Tensor], Tensor]) -> Tensor:
        """Return `flatten(source)`, done once if `source` is the block's input."""
        if not self._is_input(source):
            return flatten(source)
        if self._tokens is None:
            self._tokens = flatten(source)
        return self._tokens

    def dispatch(
        self,
        bank: ExpertBank,
        source: Tensor,
        x: Float[Tensor, "T D"],
        onto: Float[Tensor, "T O"],
        inplace: bool,
    ) -> Float[Tensor, "T O"]:
        """See `moeadapt.dispatch.dispatch`; linears that read the same input share the work.

        Args:
            bank: the experts of one linear.
            source: what the linear was called with.
            x: its tokens, cast, after dropout.
            onto: the base output.
            inplace: whether to accumulate into its memory.
        """
        if choose(bank, x, self.max_active) != "concat":
            return dispatch(x, self.weights, bank, onto, max_active=self.max_active)
        hidden = self.down(bank, source, x)
        gated = self._gate_all().get(id(bank)) if self._is_input(source) else None
        if gated is None:
            gated = bank.gate(hidden, self.scaled(bank, hidden.dtype))
        return bank.up(gated, onto, inplace)

    def scaled(self, bank: ExpertBank, dtype: torch.dtype) -> Float[Tensor, "T N"]:
        """Return `bank.scaled(weights)`, computed once for linears of one scale."""
        key = (bank.scale, bank.size.num_shared, dtype)
        if key not in self._scaled:
            self._scaled[key] = bank.scaled(self.weights, dtype)
        return self._scaled[key]

    def down(self, bank: ExpertBank, source: Tensor, x: Float[Tensor, "T D"]) -> Tensor:
        """Return `bank.down(x)`; if `source` is the block's input, one product for all readers."""
        if not self._is_input(source):
            return bank.down(x)
        if self._hidden is None:
            shared = [layer.shares_input(self._adapter) for layer in self._readers]
            banks = [other for other in shared if other is not None]
            # One that drops some of its input must not lend it to the others.
            if all(other is not bank for other in banks):
                return bank.down(x)
            self._hidden = self._project(x, banks)
        hidden = self._hidden.get(id(bank))
        return bank.down(x) if hidden is None else hidden

    def _is_input(self, source: Tensor) -> bool:
        """Whether `source` is the block's input, and still holds what was routed."""
        return source is self.input and _version(source) == self._version

    def _project(self, x: Float[Tensor, "T D"], banks: list[ExpertBank]) -> dict[int, Tensor]:
        keeps = any(bank.generation.keeps for bank in banks)
        # Packing the matrices costs as much as using them for a few tokens.
        if len(banks) < 2 or (x.shape[0] <= _FEW_TOKENS and not keeps):  # noqa: PLR2004
            return {}
        factors = [bank.factor(str(bank.reads_with)).weight for bank in banks]
        if keeps:
            packed = banks[0].generation.pack(tuple(factors), x.dtype)
        else:
            packed = torch.cat([factor.to(x.dtype) for factor in factors])
        hidden = F.linear(x, packed)
        self._banks, self._all_hidden = banks, hidden
        parts = hidden.split([factor.shape[0] for factor in factors], -1)
        return {id(bank): part for bank, part in zip(banks, parts, strict=True)}

    def _gate_all(self) -> dict[int, Tensor]:
        """Multiply the routing weights onto the ranks of all readers at once, if they are alike."""
        banks, hidden = self._banks, self._all_hidden
        if self._gated is None:
            self._gated = {}
            if hidden is not None and all(_alike(bank, banks[0]) for bank in banks):
                scaled = self.scaled(banks[0], hidden.dtype).unsqueeze(1)
                wide = scaled.expand(-1, len(banks), -1)
                gated = banks[0].gate(hidden.unflatten(-1, (len(banks), -1)), wide).unbind(1)
                self._gated = {id(bank): part for bank, part in zip(banks, gated, strict=True)}
        return self._gated


def _version(tensor: Tensor) -> int | None:
    """Return what changes with every write in place; None: it cannot be told."""
    if torch.compiler.is_compiling() or tensor.is_inference():
        return None
    return tensor._version


def _alike(bank: ExpertBank, other: ExpertBank) -> bool:
    """Whether one multiplication of the rank axis serves both."""
    sizes = [(b.size.rank, b.size.total_experts, b.size.num_shared, b.scale) for b in (bank, other)]
    return type(bank) is type(other) is LoraBank and bank.stacked and sizes[0] == sizes[1]


_FEW_TOKENS = 16
