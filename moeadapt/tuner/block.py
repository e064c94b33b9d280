"""The linears of one attention or FFN block that share one routing.

The routing is made from the block's input by a forward pre-hook and dropped by a forward hook, so
a recomputation of the block (gradient checkpointing) makes its own.
"""

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moeadapt.errors import UnsupportedError
from moeadapt.experts.generation import Generation
from moeadapt.tuner.block_routing import BlockRouting
from moeadapt.tuner.context import RoutingContext, remove_hooks
from moeadapt.tuner.decode_step import BlockStep
from moeadapt.tuner.gated_ffn import GatedFfn

if TYPE_CHECKING:
    from moeadapt.tuner.layer import MoeLoraLinear
    from moeadapt.tuner.plan import BlockPlan


class Block:
    """One routing per adapter for all target linears of one block.

    Hooks are bound methods of this plain object: unlike closures they follow a deepcopy.

    Attributes:
        plan: where the block is and whose input is routed.
        owners: adapter name -> the layer that holds its router, the first targeted of the block.
        layers: adapter name -> the linears it targets in the block, in the order of the model.
        gated: what computes a whole gated FFN; None: the block is none.
    """

    def __init__(self, plan: "BlockPlan") -> None:
        """Start without routers."""
        self.plan = plan
        self.owners: dict[str, MoeLoraLinear] = {}
        self.layers: dict[str, list[MoeLoraLinear]] = {}
        self.gated: GatedFfn | None = None
        self._routings: dict[str, BlockRouting] = {}
        self._hidden_dims = 0
        self._open_slots = 0
        self._thread: dict[str, int] = {}
        self._step: BlockStep | None = None
        self._decoding: object = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the routing of a running forward."""
        transient = {"_routings": {}, "_open_slots": 0, "_thread": {}, "_step": None}
        return {**self.__dict__, **transient, "_decoding": None}

    def install(self, model: nn.Module) -> None:
        """(Re)register the hooks on the modules that now sit at the planned paths."""
        entry, parent = model.get_submodule(self.plan.entry), model.get_submodule(self.plan.path)
        entry.register_forward_pre_hook(self.enter, with_kwargs=True)
        parent.register_forward_hook(self.leave, always_call=True)
        if entry is parent:
            self.gated = GatedFfn.install(parent, self)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Route the block's input, once per active adapter.

        Raises:
            UnsupportedError: the block is running in another thread.
        """
        self._claim()
        hidden = _first_tensor(args, kwargs)
        self._hidden_dims = hidden.dim()
        if self._step is not None and self._step.enter(hidden):
            return
        for adapter, owner in self.owners.items():
            if owner.disable_adapters or adapter not in owner.active_adapters:
                continue
            head = owner.moe_heads[adapter]
            readers = [x for x in self.layers[adapter] if x.moe_plans[adapter].reads_input]
            self._routings[adapter] = BlockRouting(adapter, head, head(hidden), hidden, readers)
            self._prepare_decoding(adapter, head.context.generation)

    def _prepare_decoding(self, adapter: str, generation: Generation) -> None:
        """Look for a shorter way, once per answer: the next token may take it."""
        if generation.decodes and self._decoding != generation.answer:
            self._decoding = generation.answer
            self._step = BlockStep.of(adapter, self)

    def leave(self, module: nn.Module, args: Any, output: Any = None) -> None:
        """Drop the routing; refuse an FFN whose slots were never added up."""
        if not torch.compiler.is_compiling():
            me = threading.get_ident()
            if self._thread.get("id", me) != me:
                return  # the call that was refused: the other one is still running
            self._thread.clear()
        open_slots, self._open_slots = self._open_slots, 0
        self._routings.clear()
        if self._step is not None:
            self._step.leave()
        if open_slots and output is not None:
            raise UnsupportedError(
                f"placement 'ffn': {self.plan.path} does not end in one of its target linears; "
                "use placement='linear' with router_scope='block' for this model"
            )

    def _claim(self) -> None:
        """Refuse a second thread: the running routing belongs to the model, not to the call."""
        if torch.compiler.is_compiling():
            return
        me = threading.get_ident()
        # setdefault is atomic, and a lock could be neither copied nor pickled.
        if self._thread.setdefault("id", me) != me:
            raise UnsupportedError(
                f"{self.plan.path} is running in another thread; a model with one routing per "
                "block runs in one thread at a time: use a lock, a copy.deepcopy of the model per "
                "thread, or placement='linear' with router_scope='layer'"
            )

    def routing(self, adapter: str) -> BlockRouting:
        """Return the running routing of `adapter`.

        Raises:
            UnsupportedError: the block is not running.
        """
        step = self.running_step(adapter)
        if step is not None and adapter not in self._routings:
            self._routings[adapter] = step.routing()
        if adapter not in self._routings:
            raise UnsupportedError(
                f"a target linear of {self.plan.path} was called outside the block's forward, so "
                "there is no routing for it; use placement='linear' with router_scope='layer'"
            )
        return self._routings[adapter]

    @property
    def takes_short_way(self) -> bool:
        """Whether the running forward is a decoding step of linears that add to their base."""
        return self._step is not None and self._step.input is not None

    def running_step(self, adapter: str) -> BlockStep | None:
        """Return the short way of a decoding step, if the block takes it now."""
        step = self._step if self.takes_short_way else None
        return step if step is not None and step.adapter == adapter else None

    def forget(self, adapter: str) -> None:
        """Drop a deleted adapter."""
        self.owners.pop(adapter, None)
        self.layers.pop(adapter, None)
        self._step = None

    def is_input(self, x: Tensor) -> bool:
        """Whether `x` is the block's input; otherwise it carries a leading axis of slots.

        Also counts the slots opened by an input projection and closed by the output projection.
        """
        is_input = x.dim() == self._hidden_dims
        self._open_slots = 1 if is_input else 0
        return is_input


def install_blocks(model: nn.Module, context: RoutingContext) -> None:
    """Put every block's hooks on the modules of `model`, replacing earlier ones."""
    remove_blocks(model)
    for block in context.blocks.values():
        block.install(model)


def remove_blocks(model: nn.Module) -> None:
    """Undo `install_blocks`."""
    remove_hooks(model, Block)
    GatedFfn.remove(model)


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    if isinstance(kwargs.get("hidden_states"), torch.Tensor):
        return kwargs["hidden_states"]
    values = [*args, *kwargs.values()]
    return next(value for value in values if isinstance(value, torch.Tensor))
