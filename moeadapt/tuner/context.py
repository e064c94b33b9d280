"""What the routers of one model share: the running forward, the aux scale, the counters.

A plain object, not a module: it owns no tensor of the adapter and is never saved. It is copied and
pickled with the model, without anything that belongs to a running forward.
"""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moeadapt.errors import ConfigError, TrainingError
from moeadapt.experts.generation import Generation
from moeadapt.routing import Routing, TokenContext
from moeadapt.tuner.decisions import keep
from moeadapt.tuner.frame import Frame, same

if TYPE_CHECKING:
    from moeadapt.tuner.block import Block
    from moeadapt.tuner.head import RouterHead


class RoutingContext:
    """Shared by every layer of one base model, across adapters.

    Attributes:
        frame: the running forward; None between forwards.
        pending: training forwards that wait for their backward, which may recompute them.
        collected: routings per layer while `collect_routing` is active, else None.
        heads: adapter name -> layer name -> its router; aux losses are averaged over them.
        blocks: path of a block -> the block, shared by all adapters.
        generation: keeps casts of the experts' matrices while tokens are being generated.
        override: replaces each routing while `override_routing` is active, else None.
        decides_per_sequence: whether some router decides once for a whole sequence.
        scale_is_set: whether a trainer (or `set_aux_loss_scale`) supplied the scale.
    """

    def __init__(self) -> None:
        """Start between forwards, with scale 1 that nobody vouched for."""
        self.frame: Frame | None = None
        self.pending: list[Frame] = []
        self.collected: dict[str, list[Routing]] | None = None
        self.heads: dict[str, dict[str, RouterHead]] = {}
        self.blocks: dict[str, Block] = {}
        self.generation = Generation()
        self.override: Callable[[str, Routing], Routing] | None = None
        self.decides_per_sequence = False
        self.scale_is_set = False
        self._scale_value = 1.0
        self._scale: dict[torch.device, Tensor] = {}
        self._warned = False
        self._backward_seen = False
        self._backward_watched = False
        self._forgotten = False

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running forward (its tensors cannot be copied)."""
        transient = {"frame": None, "pending": [], "collected": None, "_scale": {}}
        return {**self.__dict__, **transient}

    # --- the scale of the auxiliary losses

    def set_scale(self, scale: float) -> None:
        """See `moeadapt.set_aux_loss_scale`."""
        self.scale_is_set = True
        if scale != self._scale_value:
            self._scale_value = scale
            for tensor in self._scale.values():
                tensor.fill_(scale)

    def scale(self, device: torch.device) -> Tensor:
        """Return the scale as a tensor: changing its value recompiles nothing."""
        if device not in self._scale:
            self._scale[device] = torch.full((), self._scale_value, device=device)
        return self._scale[device]

    def check_scale(self, hidden: Tensor, router: nn.Module) -> None:
        """Notice a training loop that needs a scale and did not supply one.

        Raises:
            TrainingError: fp16, where the task loss is multiplied by the GradScaler.
        """
        if self.scale_is_set or torch.compiler.is_compiling():
            return
        half = torch.is_autocast_enabled(hidden.device.type) and (
            torch.get_autocast_dtype(hidden.device.type) == torch.float16
        )
        if half or hidden.dtype == torch.float16:
            raise TrainingError(
                "fp16 training multiplies the task loss by the GradScaler's scale, but not the "
                f"auxiliary losses of the routers. {_SCALE_HELP} Or use bf16."
            )
        if not self._warned and any(
            p.grad is not None and bool(p.grad.any()) for p in router.parameters()
        ):
            self._warned = True
            warnings.warn(
                "gradients are being accumulated, so the auxiliary losses of the routers weigh "
                f"more than they should: once per micro-batch. {_SCALE_HELP}",
                stacklevel=2,
            )

    # --- the running forward

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the base model and its backbone: remember what it was given.

        Raises:
            ConfigError: it was given no tokens.
        """
        if self.frame is not None and self.frame.module_id != id(module):
            return  # the backbone inside a call of the model: the outer mask is the 2-D one
        self.frame = Frame.of(module, args, kwargs, ask_cache=self.decides_per_sequence)
        if self.frame.shape is not None and 0 in self.frame.shape:
            shape, self.frame = self.frame.shape, None
            raise ConfigError(
                f"a batch of {shape[0]} rows with {shape[1]} tokens has nothing to route; leave "
                "empty rows and empty batches out of the data"
            )
        cache = None if torch.is_grad_enabled() else self.frame.cache
        self.generation.enter(cache, _tokens_of_a_row(args, kwargs))
        if torch.is_grad_enabled() and module.training and not torch.compiler.is_compiling():
            waiting = [] if self._backward_seen else self.pending
            self._forgotten = len(waiting) >= _MOST_PENDING
            self.pending = [*waiting[1 - _MOST_PENDING :], self.frame]
            self._backward_seen = self._backward_watched = False

    def watch_backward(self, weights: Tensor) -> None:
        """Notice when the running training forward is back-propagated; once per forward."""
        if not self._backward_watched and not torch.compiler.is_compiling():
            self._backward_watched = True
            weights.register_hook(self._saw_backward)

    def _saw_backward(self, grad: Tensor) -> None:
        self._backward_seen = True

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
        """Forward hook: what this forward was given must not meet a later one."""
        if self.frame is not None and self.frame.module_id == id(module):
            if self.frame.decisions:
                keep(self.frame, getattr(output, "past_key_values", None))
            self.frame = None

    def tokens(self, hidden: Tensor, needs: frozenset[str] = frozenset()) -> TokenContext:
        """Return what is known about the tokens of `hidden` [..., D], flattened.

        Args:
            hidden: the hidden states to route.
            needs: fields of `TokenContext` that must be known, besides the mask.

        Raises:
            UnsupportedError: something needed is unknown.
            TrainingError: see `_recomputed`.
        """
        if self.recomputes():
            return self._recomputed(hidden, needs)
        frame = self.frame or Frame(module_id=0)
        return frame.tokens(hidden, needs)

    def recomputes(self) -> bool:
        """Whether a backward is running, so that gradient checkpointing repeats a forward."""
        return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1

    def _recomputed(self, hidden: Tensor, needs: frozenset[str]) -> TokenContext:
        """Return the context of the forward that gradient checkpointing is repeating.

        Raises:
            TrainingError: several forwards with different masks wait for this backward.
        """
        self._backward_seen = True
        # A frame of another shape belongs to another forward.
        found = [frame.tokens(hidden, needs) for frame in self.pending if frame.fits(hidden)]
        if self._forgotten or any(not same(other, found[0]) for other in found[1:]):
            raise TrainingError(
                "several training forwards with different padding masks (or, for routers that look "
                "at them, sequences or token ids) wait for one backward, and gradient "
                "checkpointing cannot tell the routers which one it repeats. Run backward after "
                "each forward, put them into one batch, or turn checkpointing off."
            )
        return found[0] if found else Frame(module_id=0).tokens(hidden, needs)


# Without checkpointing nobody asks for them, so only a few are kept.
_MOST_PENDING = 8

_SCALE_HELP = (
    "Use a trainer of moeadapt.training, or add MoeAdaptCallback() to yours, or call "
    "moeadapt.set_aux_loss_scale(model, amp_scale / accumulation_steps) before each backward."
)


def attach_context(model: nn.Module) -> RoutingContext:
    """Return the context of `model`, installing it and its hooks once."""
    context = getattr(model, _ATTRIBUTE, None)
    if context is not None:
        return context
    context = RoutingContext()
    setattr(model, _ATTRIBUTE, context)
    backbone = getattr(model, getattr(model, "base_model_prefix", "") or "-", None)
    # Some trainers call the backbone directly.
    for module in {id(m): m for m in (model, backbone) if isinstance(m, nn.Module)}.values():
        module.register_forward_pre_hook(context.enter, with_kwargs=True)
        module.register_forward_hook(context.leave, with_kwargs=True, always_call=True)
    return context


def find_context(model: nn.Module) -> RoutingContext | None:
    """Return the context of the base model inside any wrapper, or None."""
    found = (vars(m).get(_ATTRIBUTE) for m in model.modules())
    return next((context for context in found if context is not None), None)


def remove_hooks(model: nn.Module, owner: type) -> None:
    """Drop every forward hook that is a bound method of an `owner`.

    Found by scanning, since handles kept from registration would be lost in a deepcopy.
    """
    for module in model.modules():
        for registry in (module._forward_pre_hooks, module._forward_hooks):
            for key in [k for k, hook in registry.items() if isinstance(_bound_to(hook), owner)]:
                del registry[key]
                for extra in _HOOK_FLAGS:
                    vars(module).get(extra, {}).pop(key, None)


def detach_context(model: nn.Module) -> None:
    """Undo `attach_context`."""
    remove_hooks(model, RoutingContext)
    vars(model).pop(_ATTRIBUTE, None)


def _bound_to(hook: Any) -> Any:
    return getattr(hook, "__self__", None)


_ATTRIBUTE = "_moeadapt_context"

_HOOK_FLAGS = (
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


def _tokens_of_a_row(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return the length of what a model was called with; 0: it is not told by its tensors."""
    for value in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]):
        if isinstance(value, Tensor) and value.dim() > 1:
            return value.shape[1]
    return 0
