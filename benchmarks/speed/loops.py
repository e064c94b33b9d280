"""The same adapter computed as other implementations do, put into the same Llama.

`mirrored` reads the numbers of one of our adapters and returns the model with loops over experts in
place of our layers: for linears `loop_sparse` of `forms`, with a router per linear or per block;
for FFNs the published MixLoRA of `ffn_forms`; for unrouted linears a plain LoRA.

Letters: T tokens, D in, O out, N experts, r rank of one, K experts per token.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.speed.ffn_forms import LINEARS, Pairs, PublishedFfn, routed
from moeadapt.tuner.layer import MoeLoraLinear

ADAPTER = "default"


class LoopRouter(nn.Module):
    """Chooses experts by the linear's input, or by that of its block where a hook has seen it."""

    def __init__(self, weight: Tensor, k: int) -> None:
        super().__init__()
        self.weight, self.k = nn.Parameter(weight.detach().clone()), k
        self.shared: tuple[Tensor, Tensor] | None = None

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Route for the whole block, as a forward pre-hook of it."""
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        self.shared = routed(hidden.reshape(-1, hidden.shape[-1]), self.weight, self.k)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return choice and weights [T, K]."""
        return self.shared or routed(x, self.weight, self.k)


class LoopLinear(nn.Module):
    """A linear with a loop over its experts; without a router it has one expert, always used."""

    def __init__(self, base: nn.Module, pairs: Pairs, router: LoopRouter | None) -> None:
        super().__init__()
        self.base, self.pairs, self.router = base, pairs, router

    def forward(self, hidden: Tensor) -> Tensor:
        """Return base output plus mixture of `hidden` [..., D]."""
        x = hidden.reshape(-1, hidden.shape[-1])
        y = self.base(x)
        if self.router is None:
            y = y + self.pairs.delta(x, 0)
        else:
            choice, weights = self.router(x)
            y = y + self._mixture(x, choice, weights.to(x.dtype), y)
        return y.view(*hidden.shape[:-1], -1)

    def _mixture(self, x: Tensor, choice: Tensor, weights: Tensor, y: Tensor) -> Tensor:
        experts = len(self.pairs.a)
        chosen = F.one_hot(choice, experts).permute(2, 1, 0)
        delta = torch.zeros_like(y)
        for expert in range(experts):
            slot, token = torch.where(chosen[expert])
            out = self.pairs.delta(x[token], expert)
            delta.index_add_(0, token, out * weights[token, slot, None])
        return delta


def pairs_of(layer: MoeLoraLinear) -> Pairs:
    """Return copies of the factors of `layer`, one parameter per expert."""
    bank = layer.moe_banks[ADAPTER]
    size = bank.size
    a, b = (bank.factor(name).weight.detach() for name in ("lora_A", "lora_B"))
    return Pairs(
        a.unflatten(0, (size.total_experts, size.rank)),
        b.unflatten(1, (size.total_experts, size.rank)).movedim(1, 0),
        size.scale,
    )


def mirrored(base: Any, adapted: Any) -> Any:
    """Return a copy of `base` that computes as `adapted`, the same base with our adapter."""
    ours = dict(adapted.base_model.model.named_modules())
    copied = copy.deepcopy(base)
    copied.requires_grad_(False)
    routers: dict[str, LoopRouter] = {}
    layers = {name: m for name, m in ours.items() if isinstance(m, MoeLoraLinear)}
    for name, layer in layers.items():
        if layer.moe_plans[ADAPTER].placement == "ffn":
            continue
        parent, _, own = name.rpartition(".")
        router = _router_of(layer, copied, routers)
        linear = LoopLinear(copied.get_submodule(name), pairs_of(layer), router)
        setattr(copied.get_submodule(parent), own, linear)
    for name, layer in layers.items():
        plan = layer.moe_plans[ADAPTER]
        if plan.placement == "ffn" and name.endswith(LINEARS[0]):
            _replace_ffn(copied, name.rpartition(".")[0], layers)
    return copied


def _router_of(
    layer: MoeLoraLinear, model: nn.Module, routers: dict[str, LoopRouter]
) -> LoopRouter | None:
    plan = layer.moe_plans[ADAPTER]
    if plan.placement == "unrouted":
        return None
    if plan.block is None:
        gate = layer.moe_heads[ADAPTER].router
        return LoopRouter(gate.weight, gate.k)
    path = plan.block.path
    if path not in routers:
        gate = layer.moe_blocks[ADAPTER].owners[ADAPTER].moe_heads[ADAPTER].router
        routers[path] = LoopRouter(gate.weight, gate.k)
        entry = model.get_submodule(plan.block.entry)
        entry.register_forward_pre_hook(routers[path].enter, with_kwargs=True)
    return routers[path]


def _replace_ffn(model: nn.Module, path: str, layers: dict[str, MoeLoraLinear]) -> None:
    own = {name: layers[f"{path}.{name}"] for name in LINEARS}
    block = own[LINEARS[0]].moe_blocks[ADAPTER]
    gate = block.owners[ADAPTER].moe_heads[ADAPTER].router
    base = {n: model.get_submodule(f"{path}.{n}").weight for n in LINEARS}
    pairs = {name: pairs_of(layer) for name, layer in own.items()}
    ffn = PublishedFfn(base, pairs, gate.weight.detach().clone(), gate.k)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, ffn)
