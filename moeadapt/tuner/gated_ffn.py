"""Runs a gated FFN with experts as a whole, so that little is kept for backward.

The FFN's own forward is replaced by one that calls the same three linears but puts
`moeadapt.dispatch.activation` between them. It steps aside, for the FFN's own forward, whenever
that is not the same.
"""

from collections.abc import Callable
from types import CodeType
from typing import TYPE_CHECKING, Any, no_type_check

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from moeadapt.dispatch import Columns, Contraction, Expansion, mix_activation
from moeadapt.experts import ExpertBank

if TYPE_CHECKING:
    from moeadapt.tuner.block import Block
    from moeadapt.tuner.layer import MoeLoraLinear


class GatedFfn:
    """Bound to one FFN; its `forward` stands in for the module's.

    Attributes:
        adapter: the adapter whose FFN runs as a whole now; None: none does.
        hidden: the rank axis of the linears of the running FFN, by the linear's identity.
    """

    def __init__(self, module: nn.Module, block: "Block") -> None:
        """Look at `module`, whose input `block` routes."""
        self.module: Any = module
        self.block = block
        self.adapter: str | None = None
        self.hidden: dict[int, Tensor] = {}
        self._columns_on: dict[Any, Columns] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running forward."""
        return {**self.__dict__, "adapter": None, "hidden": {}, "_columns_on": {}}

    @staticmethod
    def install(module: nn.Module, block: "Block") -> "GatedFfn | None":
        """Replace the forward of `module` if it is that of a gated FFN; else return None."""
        if "forward" in vars(module) or not _is_gated(_code(type(module))):
            return None
        gated = GatedFfn(module, block)
        module.forward = gated.forward
        return gated

    @staticmethod
    def remove(model: nn.Module) -> None:
        """Give every FFN of `model` its own forward back."""
        for module in model.modules():
            own = vars(module).get("forward")
            if isinstance(getattr(own, "__self__", None), GatedFfn):
                del module.forward

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the FFN."""
        whole = len(args) == 1 and not kwargs and not torch.compiler.is_compiling()
        adapter = self._adapter(args[0]) if whole else None
        if adapter is None:
            return type(self.module).forward(self.module, *args, **kwargs)
        self.adapter = adapter
        try:
            return self._forward(adapter, args[0])
        finally:
            self.adapter = None
            self.hidden = {}

    def _forward(self, adapter: str, x: Tensor) -> Tensor:
        layers = self._layers()
        gate, up, down = (layer.moe_banks[adapter] for layer in layers)
        base = [projection(x) for projection in layers[:2]]
        flat = [out.reshape(-1, out.shape[-1]) for out in base]
        dtype, device = flat[0].dtype, x.device
        parts = [
            Expansion(
                self.hidden[id(layer)] * bank.scale,
                bank.matrix("lora_B", dtype),
                self._columns(bank, device),
            )
            for layer, bank in zip(layers, (gate, up), strict=False)
        ]
        slots = self.block.routing(adapter).slots
        mixed, hidden = mix_activation(
            (flat[0], flat[1]),
            (parts[0], parts[1]),
            Contraction(down.matrix("lora_A", dtype), self._columns(down, device)),
            (slots.experts, slots.weights),
            _plain(self.module.act_fn),
        )
        self.hidden[id(layers[2])] = hidden * down.scale
        return layers[2](mixed.view(base[0].shape))

    def _columns(self, bank: ExpertBank, device: torch.device) -> Columns:
        """Return whose each rank is, sent to the device once."""
        key = (*bank.size.all_ranks, bank.size.num_shared, device)
        if key not in self._columns_on:
            ranks, routed = bank.size.all_ranks, bank.size.num_experts
            self._columns_on[key] = Columns(ranks[:routed], sum(ranks[routed:]), device)
        return self._columns_on[key]

    def _layers(self) -> "list[MoeLoraLinear]":
        return [getattr(self.module, name) for name in _NAMES]

    def _adapter(self, x: Tensor) -> str | None:
        """Return the adapter to run; None: the FFN's own forward has to."""
        if self.block.takes_short_way:
            return None  # its experts do not span the FFN
        if not (_is_gated(_code(type(self.module))) and _is_a_function(self.module.act_fn)):
            return None  # somebody has replaced a part, or looks into it
        layers = self._layers()
        if any(not hasattr(layer, "runs_whole") for layer in layers):
            return None
        active = {tuple(layer.running_adapters()) for layer in layers}
        if len(active) != 1 or len(names := active.pop()) != 1:
            return None
        (adapter,) = names
        generates = layers[0].moe_banks[adapter].generation.keeps
        if generates and x.numel() // x.shape[-1] <= _FEW_TOKENS:
            return None
        return adapter if all(layer.runs_whole(adapter) for layer in layers) else None


def _plain(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return torch's own function for transformers' SiLU, whose slope and kernel are known."""
    return F.silu if type(activation) is type(ACT2FN["silu"]) else activation


def _code(cls: type[nn.Module]) -> CodeType | None:
    return getattr(cls.forward, "__code__", None)


def _is_a_function(activation: Any) -> bool:
    """Whether only its values count: no parameters, nobody who waits for it to be called."""
    if not isinstance(activation, nn.Module):
        return True
    hooks = (
        activation._forward_hooks,
        activation._forward_pre_hooks,
        activation._backward_hooks,
        activation._backward_pre_hooks,
    )
    replaced = "forward" in vars(activation)
    return not (any(hooks) or replaced or next(activation.parameters(), None) is not None)


def _is_gated(code: CodeType | None) -> bool:
    """Whether a forward is, instruction by instruction, that of a gated FFN."""
    return code is not None and any(
        (code.co_code, code.co_names, code.co_argcount)
        == (known.co_code, known.co_names, known.co_argcount)
        for known in (_named.__code__, _direct.__code__)
    )


# Run-time type checks would wrap them, and what is compared is their own code.
@no_type_check
def _named(self: Any, x: Tensor) -> Tensor:
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj


@no_type_check
def _direct(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


_NAMES = ("gate_proj", "up_proj", "down_proj")
# Decoding a few tokens keeps nothing anyway, and the FFN's own forward launches less. Any other
# pass without gradients computes as training does, which reentrant checkpointing relies on.
_FEW_TOKENS = 64
