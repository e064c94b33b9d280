"""The short way through a linear while tokens are generated: the same numbers, fewer steps.

A decoding step has so few tokens that looking everything up costs more than computing it. What was
looked up in the step before is used again while it is still true; each use checks that by identity,
so that whatever was replaced, hooked or switched meanwhile takes the usual way.

Letters: T tokens, D width of the block's input, E experts, N routed and shared experts, S linears
that read the block's input, r rank of one expert, R = N * r, O out.
"""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as hooks

from moeadapt.dispatch import choose
from moeadapt.experts.lora import LoraBank
from moeadapt.tuner.block_routing import BlockRouting

if TYPE_CHECKING:
    from moeadapt.tuner.block import Block
    from moeadapt.tuner.head import RouterHead
    from moeadapt.tuner.layer import MoeLoraLinear

_GLOBAL_HOOKS = (hooks._global_forward_hooks, hooks._global_forward_pre_hooks)


class _Transient:
    """Belongs to a running generation: a copy or a pickle of its owner has None instead."""

    def __reduce__(self) -> Any:
        return type(None), ()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None


class RouterStep(_Transient):
    """The gate of a router, without what only statistics need.

    Attributes:
        weight: of the gate.
    """

    def __init__(self, head: "RouterHead") -> None:
        """Remember the router of `head`."""
        self._head, self._context, self._router = head, head.context, head.router
        self._hooks = (*_hooks_of(self._router), *_GLOBAL_HOOKS)
        self._decodes = self._router.decodes
        self.weight: Tensor = self._router._parameters["weight"] if self._decodes else Tensor()  # type: ignore[assignment]

    def holds(self, x: Tensor) -> bool:
        """Whether the short way may be taken for these tokens."""
        context, router = self._context, self._router
        return (
            self._decodes
            and context.collected is None
            and context.override is None
            and not router.training
            and not any(self._hooks)
            and self._head.router is router
            and router._parameters["weight"] is self.weight
            and context.generation.keeps
            and not torch.is_autocast_enabled(x.device.type)
        )

    def __call__(
        self, x: Float[Tensor, "T D"], others: tuple[Tensor, ...]
    ) -> tuple[Float[Tensor, "T E"], Float[Tensor, "T R"] | None]:
        """Return the weights, and the tokens times all of `others`, in one product if it can be."""
        router, weight, hidden = self._router, self.weight, None
        if others and weight.dtype == x.dtype:
            both = F.linear(x, self._context.generation.pack((weight, *others), x.dtype))
            logits, hidden = both[:, : weight.shape[0]], both[:, weight.shape[0] :]
        else:
            logits = F.linear(x.to(weight.dtype), weight)
        bias: Any = router.bias
        return router.decode(logits if bias is None else logits + bias), hidden


class BlockStep(_Transient):
    """One adapter's routing of a running block, and the rank axes of all that read its input.

    Attributes:
        adapter: its name.
        input: what was routed; None: the block is not running, or takes the usual way.
        weights: of the experts.
    """

    def __init__(self, adapter: str, block: "Block") -> None:
        """Remember what the block of `adapter` consists of."""
        self.adapter = adapter
        self._owner, self._layers = block.owners[adapter], block.layers[adapter]
        self._router = RouterStep(self._owner.moe_heads[adapter])
        self.input: Tensor | None = None
        self.weights: Tensor | None = None
        self._version: int | None = None
        self._scaled: dict[tuple[float, int, torch.dtype], Tensor] = {}
        self._readers: list[LinearStep] | None = None
        self._matrices: tuple[Tensor, ...] = ()
        self._gated: dict[int, Tensor] = {}

    def enter(self, hidden: Float[Tensor, "*T D"]) -> bool:
        """Route the block's input; False: the usual way is to be taken."""
        owner = self._owner
        if owner._active_adapter != [self.adapter] or owner._disable_adapters:
            return False
        if not self._router.holds(hidden):
            return False
        if self._readers is None:
            self._find_readers()
        self.input = hidden
        self._version = None if hidden.is_inference() else hidden._version
        flat = hidden.reshape(-1, hidden.shape[-1])
        self.weights, ranks = self._router(flat, self._matrices)
        if ranks is not None and self._readers:
            self._gate(ranks, self._readers)
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
        readers = [x for x in self._layers if x.moe_plans[self.adapter].reads_input]
        head = self._owner.moe_heads[self.adapter]
        return BlockRouting(self.adapter, head, self.weights, self.input, readers)

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
        own = [layer for layer in self._layers if layer.moe_plans[self.adapter].reads_input]
        steps = [layer.decode_step for layer in own]
        known = [step for step in steps if step is not None]
        if len(known) == len(steps) and all(step.is_like(known[0]) for step in known):
            self._readers = known
            self._matrices = tuple(step.matrix_a for step in known)
        else:
            self._readers = []

    def _gate(self, ranks: Float[Tensor, "T W"], readers: "list[LinearStep]") -> None:
        bank = readers[0].bank
        size, count = bank.size, len(readers)
        weights = self.scaled(bank, ranks.dtype).view(-1, 1, size.total_experts, 1)
        ranks.view(-1, count, size.total_experts, size.rank).mul_(weights)
        for step, part in zip(
            readers, ranks.view(-1, count, ranks.shape[-1] // count).unbind(1), strict=True
        ):
            self._gated[id(step)] = part


class LinearStep(_Transient):
    """One linear with experts: `base(x) + (x A^T * weights) B^T`, in the memory of the base output.

    Attributes:
        bank: its experts.
        matrix_a: lora_A.
    """

    def __init__(self, layer: "MoeLoraLinear", adapter: str, x: Tensor) -> None:
        """Remember the parts of `layer`; see `of`."""
        self._layer, self._adapter = layer, adapter
        self.bank: LoraBank = layer.moe_banks[adapter]  # type: ignore[assignment]
        self._base, self._block = layer.base_layer, layer.moe_blocks.get(adapter)
        self._router = None if self._block else RouterStep(layer.moe_heads[adapter])
        a, b = (self.bank.factor(name) for name in ("lora_A", "lora_B"))
        self.matrix_a, self._matrix_b, self._factors = a.weight, b.weight, (a, b)
        self._dtype, self._shape, self._impl = self.matrix_a.dtype, x.shape, self.bank.impl
        watched = (*_hooks_of(a), *_hooks_of(b), self._base._forward_hooks, *_GLOBAL_HOOKS)
        self._hooks = watched
        self._experts = (self.bank.size.total_experts, self.bank.size.rank)

    @classmethod
    def of(cls, layer: "MoeLoraLinear", adapter: str, x: Tensor) -> "LinearStep | None":
        """Return the short way of `layer`, or None: it has none."""
        bank = layer.moe_banks[adapter]
        fits = (
            layer.moe_plans[adapter].placement == "linear"
            and type(bank) is LoraBank
            and bank.stacked
            and all(bank.factor(name).is_whole for name in bank.factor_names)
            and layer.quantization_backend is None
            and type(layer.base_layer) is nn.Linear
            and not layer.has_start(adapter)
            and choose(bank, layer.flat(x), _max_active(layer, adapter)) == "concat"
        )
        return cls(layer, adapter, x) if fits else None

    def __call__(self, x: Float[Tensor, "*T D"]) -> Float[Tensor, "*T O"] | None:
        """Return the output, or None: the usual way is to be taken."""
        if not self._holds(x):
            return None
        hidden = weights = None
        if self._block is not None:
            shared = self._block.running_step(self._adapter)
            if shared is None:
                return None
            gated = shared.gated(self, x)
            weights = shared.scaled(self.bank, self._dtype) if gated is None else None
        elif self._router is not None and self._router.holds(x):
            gated = None
            flat = x.reshape(-1, x.shape[-1])
            weights, hidden = self._router(flat, (self.matrix_a,))
            weights = self.bank.scaled(weights, self._dtype)
        else:
            return None
        if weights is not None:
            if hidden is None:
                hidden = F.linear(x.reshape(-1, x.shape[-1]), self.matrix_a)
            gated = hidden
            gated.view(-1, *self._experts).mul_(weights.unsqueeze(-1))
        out = self._base(x)
        # A view: no gradients are recorded here.
        out.view(-1, out.shape[-1]).addmm_(gated, self._matrix_b.t())
        return out

    def is_like(self, other: "LinearStep") -> bool:
        """Whether one product and one multiplication of the rank axis serve both."""
        mine, its = self.bank.size, other.bank.size
        same = (mine.rank, mine.total_experts, mine.num_shared, mine.scale, self._dtype)
        return same == (its.rank, its.total_experts, its.num_shared, its.scale, other._dtype)

    def _holds(self, x: Tensor) -> bool:
        layer, name = self._layer, self._adapter
        a, b = self._factors
        held = self.bank._factors
        return (
            layer._active_adapter == [name]
            and not layer._disable_adapters
            and x.dtype == self._dtype
            and x.shape == self._shape
            and self.bank.impl == self._impl
            and layer._modules["base_layer"] is self._base
            and "forward" not in self._base.__dict__
            and not any(self._hooks)
            and not (layer.training and layer.drops(name))
            and held["lora_A"]._modules.get(name) is a
            and held["lora_B"]._modules.get(name) is b
            and a._parameters["weight"] is self.matrix_a
            and b._parameters["weight"] is self._matrix_b
            and self.matrix_a.dtype == self._dtype
        )


def _max_active(layer: "MoeLoraLinear", adapter: str) -> int:
    block = layer.moe_blocks.get(adapter)
    owner = layer if block is None else block.owners[adapter]
    return owner.moe_heads[adapter].max_active


def _hooks_of(module: nn.Module) -> tuple[Any, Any]:
    return module._forward_hooks, module._forward_pre_hooks
