"""The short way through a linear while tokens are generated: the same numbers, fewer steps.

A decoding step has so few tokens that looking everything up costs more than computing it. What was
looked up in the step before is used again while it is still true; each use checks that by identity,
so that whatever was replaced, hooked or switched meanwhile takes the usual way.

Letters: T tokens, D width of the block's input, E experts, N routed and shared experts, S linears
that read the block's input, r rank of one expert, R = N * r, O out.
"""

import weakref
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from moeadapt.dispatch import choose
from moeadapt.experts.lora import LoraBank
from moeadapt.tuner.block_routing import BlockRouting
from moeadapt.tuner.router_step import GLOBAL_HOOKS, RouterStep, Transient, hooks_of

if TYPE_CHECKING:
    from moeadapt.tuner.block import Block
    from moeadapt.tuner.layer import MoeLoraLinear


class BlockStep(Transient):
    """One adapter's routing of a running block, and the rank axes of all that read its input.

    Attributes:
        adapter: its name.
        input: what was routed; None: the block is not running, or takes the usual way.
        weights: of the experts.
    """

    def __init__(self, adapter: str, block: "Block", router: RouterStep) -> None:
        """Remember what the block of `adapter` consists of; see `of`."""
        self.adapter, self._router = adapter, router
        self._owner, self._layers = block.owners[adapter], block.layers[adapter]
        self._reading = [x for x in self._layers if x.moe_plans[adapter].reads_input]
        self.input: Tensor | None = None
        self.weights: Tensor | None = None
        self._version: int | None = None
        self._scaled: dict[tuple[float, int, torch.dtype], Tensor] = {}
        self._readers: list[LinearStep | None] = []
        self._matrices: tuple[Tensor, ...] = ()
        self._gated: dict[int, Tensor] = {}

    @classmethod
    def of(cls, adapter: str, block: "Block") -> "BlockStep | None":
        """Return the short way of a block, or None: it has none."""
        if any(x.moe_plans[adapter].placement != "linear" for x in block.layers[adapter]):
            return None
        router = RouterStep.of(block.owners[adapter].moe_heads[adapter])
        return None if router is None else cls(adapter, block, router)

    def enter(self, hidden: Float[Tensor, "*T D"]) -> bool:
        """Route the block's input; False: the usual way is to be taken."""
        owner = self._owner
        if owner._active_adapter != [self.adapter] or owner._disable_adapters:
            return False
        if not self._router.holds(hidden):
            return False
        self._find_readers()
        self.input = hidden
        self._version = None if hidden.is_inference() else hidden._version
        flat = hidden.reshape(-1, hidden.shape[-1])
        self.weights, ranks = self._router(flat, self._matrices)
        if ranks is not None:
            self._gate(ranks)
        return True

    def leave(self) -> None:
        """Drop the routing."""
        self.input = self.weights = None
        self._gated.clear()
        self._scaled.clear()

    def routing(self) -> BlockRouting:
        """Return the same routing for a linear that takes the usual way.

        Raises:
            RuntimeError: the block is not running.
        """
        if self.input is None or self.weights is None:
            raise RuntimeError("the block is not running")
        head = self._owner.moe_heads[self.adapter]
        return BlockRouting(self.adapter, head, self.weights, self.input, self._reading)

    def gated(self, step: "LinearStep", x: Tensor) -> Float[Tensor, "T R"] | None:
        """Return what goes into `up` if it was computed for all that read the block's input."""
        same = x is self.input and (self._version is None or x._version == self._version)
        return self._gated.get(id(step)) if same else None

    def scaled(self, bank: LoraBank, dtype: torch.dtype) -> Float[Tensor, "T N"]:
        """Return `bank.scaled(weights)`, computed once for linears of one scale."""
        key = (bank.size.scale, bank.size.num_shared, dtype)
        if key not in self._scaled:
            self._scaled[key] = bank.scaled(self.weights, dtype)  # type: ignore[arg-type]
        return self._scaled[key]

    def _find_readers(self) -> None:
        """Look which linears may share one product; they have made their own steps by now."""
        steps = [layer.decode_step for layer in self._reading]
        if all(old is new for old, new in zip(self._readers, steps, strict=False)) and (
            len(self._readers) == len(steps)
        ):
            return
        self._readers, self._matrices = steps, ()
        known = [step for step in steps if step is not None]
        if len(known) == len(steps) and all(step.is_like(known[0]) for step in known):
            self._matrices = tuple(step.matrix_a for step in known)

    def _gate(self, ranks: Float[Tensor, "T W"]) -> None:
        readers = [step for step in self._readers if step is not None]
        size, count = readers[0].bank.size, len(readers)
        weights = self.scaled(readers[0].bank, ranks.dtype).view(-1, 1, size.total_experts, 1)
        ranks.view(-1, count, size.total_experts, size.rank).mul_(weights)
        parts = ranks.view(-1, count, ranks.shape[-1] // count).unbind(1)
        for step, part in zip(readers, parts, strict=True):
            self._gated[id(step)] = part


class LinearStep(Transient):
    """One linear with experts: `base(x) + (x A^T * weights) B^T`, in the memory of the base output.

    Does not hold its layer or the base, so that neither outlives what else holds it.

    Attributes:
        bank: its experts.
        matrix_a: lora_A.
    """

    def __init__(
        self, layer: "MoeLoraLinear", adapter: str, x: Tensor, router: RouterStep | None
    ) -> None:
        """Remember the parts of `layer`; see `of`."""
        self._adapter, self._router = adapter, router
        self.bank: LoraBank = layer.moe_banks[adapter]  # type: ignore[assignment]
        self._base, self._block = weakref.ref(layer.base_layer), layer.moe_blocks.get(adapter)
        a, b = (self.bank.factor(name) for name in ("lora_A", "lora_B"))
        self.matrix_a, self._matrix_b, self._factors = a.weight, b.weight, (a, b)
        self._dtype, self._shape, self._impl = x.dtype, x.shape, self.bank.impl
        base_hooks = layer.base_layer._forward_hooks
        self._hooks = (*hooks_of(a), *hooks_of(b), base_hooks, *GLOBAL_HOOKS)
        self._experts = (self.bank.size.total_experts, self.bank.size.rank)

    @classmethod
    def of(cls, layer: "MoeLoraLinear", adapter: str, x: Tensor) -> "LinearStep | None":
        """Return the short way of `layer`, or None: it has none."""
        bank, in_block = layer.moe_banks[adapter], adapter in layer.moe_blocks
        fits = (
            layer.moe_plans[adapter].placement == "linear"
            and type(bank) is LoraBank
            and bank.stacked
            and all(bank.factor(name).is_whole for name in bank.factor_names)
            and layer.quantization_backend is None
            and type(layer.base_layer) is nn.Linear
            and not layer.has_start(adapter)
            and x.dtype
            != torch.float16  # an expert that is not chosen may overflow, see `multiply`
            and choose(bank, layer.flat(x), _max_active(layer, adapter)) == "concat"
        )
        router = RouterStep.of(layer.moe_heads[adapter]) if fits and not in_block else None
        return cls(layer, adapter, x, router) if fits and (in_block or router) else None

    def __call__(
        self, layer: "MoeLoraLinear", x: Float[Tensor, "*T D"]
    ) -> Float[Tensor, "*T O"] | None:
        """Return the output, or None: the usual way is to be taken."""
        if not self._holds(layer, x):
            return None
        hidden = weights = gated = None
        if self._block is not None:
            shared = self._block.running_step(self._adapter)
            if shared is None:
                return None
            gated = shared.gated(self, x)
            weights = shared.scaled(self.bank, self._dtype) if gated is None else None
        elif self._router is not None and self._router.holds(x):
            weights, hidden = self._router(x.reshape(-1, x.shape[-1]), (self.matrix_a,))
            weights = self.bank.scaled(weights, self._dtype)
        else:
            return None
        cast = self.bank.generation.cast
        if weights is not None:
            if hidden is None:
                hidden = F.linear(x.reshape(-1, x.shape[-1]), cast(self.matrix_a, self._dtype))
            gated = hidden
            gated.view(-1, *self._experts).mul_(weights.unsqueeze(-1))
        out = layer.base_layer(x)
        # A view: no gradients are recorded here.
        out.view(-1, out.shape[-1]).addmm_(gated, cast(self._matrix_b, self._dtype).t())
        return out

    def is_like(self, other: "LinearStep") -> bool:
        """Whether one product and one multiplication of the rank axis serve both."""
        mine, its = self.bank.size, other.bank.size
        same = (mine.rank, mine.total_experts, mine.num_shared, mine.scale, self._dtype)
        return same == (its.rank, its.total_experts, its.num_shared, its.scale, other._dtype)

    def _holds(self, layer: "MoeLoraLinear", x: Tensor) -> bool:
        name, held = self._adapter, self.bank._factors
        a, b = self._factors
        base = layer._modules["base_layer"]
        return (
            layer._active_adapter == [name]
            and not layer._disable_adapters
            and x.dtype == self._dtype
            and x.shape == self._shape
            and self.bank.impl == self._impl
            and base is not None
            and base is self._base()
            and "forward" not in base.__dict__
            and not any(self._hooks)
            and not (layer.training and layer.drops(name))
            and held["lora_A"]._modules.get(name) is a
            and held["lora_B"]._modules.get(name) is b
            and a._parameters["weight"] is self.matrix_a
            and b._parameters["weight"] is self._matrix_b
            and "forward" not in a.__dict__
            and "forward" not in b.__dict__
        )


def _max_active(layer: "MoeLoraLinear", adapter: str) -> int:
    block = layer.moe_blocks.get(adapter)
    owner = layer if block is None else block.owners[adapter]
    return owner.moe_heads[adapter].max_active
