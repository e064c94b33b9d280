"""Where each expert sits in the factors of a bank, and what is always on beside the routed ones.

Letters: D in, O out, r rank of one expert.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moeadapt.errors import ConfigError, UnsupportedError
from moeadapt.experts import EXPERTS, ExpertBank
from moeadapt.experts.heterogeneous import HeterogeneousBank
from moeadapt.experts.lora import LoraBank
from moeadapt.experts.shared_a import SharedABank
from moeadapt.experts.shared_b import SharedBBank
from moeadapt.export.low_rank import stack
from moeadapt.tuner.adapter_layer import PREFIX
from moeadapt.tuner.layer import MoeLoraLinear
from moeadapt.tuner.plain import Pair
from moeadapt.tuner.segments import START_NAMES

Axes = Mapping[str, int | None]

_BOTH: Axes = {"lora_A": 0, "lora_B": 1}
EXPERT_AXES: Mapping[type[ExpertBank], Axes] = {
    LoraBank: _BOTH,
    HeterogeneousBank: _BOTH,
    SharedABank: {"lora_A": None, "lora_B": 1},
    SharedBBank: {"lora_A": 0, "lora_B": None},
}
"""Bank -> factor -> the axis along which its experts lie; None: they have it in common."""


def check_linear(layers: Mapping[str, MoeLoraLinear], adapter: str) -> None:
    """Refuse experts that are no matrix beside an unchanged linear, or not finite.

    Raises:
        UnsupportedError: says which experts, why, and what works instead.
        ConfigError: a factor holds NaN or infinity.
    """
    for key, layer in layers.items():
        bank = layer.moe_banks[adapter]
        for name in bank.factor_names:
            if not torch.isfinite(bank.factor(name).weight).all():
                raise ConfigError(
                    f"{name} of {key!r} holds NaN or infinity: training diverged, or the file is "
                    "damaged; go back to an earlier checkpoint"
                )
        if type(bank) not in EXPERT_AXES or not bank.linear:
            name = next(n for n, c in EXPERTS.items() if c is type(bank.config))
            raise UnsupportedError(
                f"the experts {name!r} of {key!r} are no low-rank matrices of their own (what they "
                "add depends on the token, or on more than the input of the linear), so no LoRA "
                "is made of them; train one on the mixture's answers with moeadapt.distill, or "
                "keep the adapter"
            )


def columns(bank: ExpertBank, expert: int) -> slice:
    """Return where `expert` sits on the expert axis of its factors; shared experts come last."""
    start = sum(bank.size.all_ranks[:expert])
    return slice(start, start + bank.size.all_ranks[expert])


def factor_of(bank: ExpertBank, name: str) -> Tensor:
    """Return a factor, detached, in double precision."""
    return bank.factor(name).weight.detach().double()


def expert_pair(bank: ExpertBank, expert: int) -> Pair:
    """Return what `expert` adds with weight 1: `b @ a` is its `delta_weight`."""
    axes, own = EXPERT_AXES[type(bank)], columns(bank, expert)
    a, b = factor_of(bank, "lora_A"), factor_of(bank, "lora_B")
    a = a if axes["lora_A"] is None else a[own]
    b = b if axes["lora_B"] is None else b[:, own]
    return Pair(a=a, b=bank.size.scale * b)


def routed_pairs(bank: ExpertBank) -> list[Pair]:
    """Return what each routed expert adds with weight 1."""
    return [expert_pair(bank, expert) for expert in range(bank.size.num_experts)]


def constant_pair(layer: MoeLoraLinear, adapter: str) -> Pair | None:
    """Return what does not depend on the routing: shared experts, an unrouted LoRA, a start.

    None: there is nothing.
    """
    bank = layer.moe_banks[adapter]
    size = bank.size
    first = 0 if is_unrouted(layer, adapter) else size.num_experts
    pairs = [expert_pair(bank, expert) for expert in range(first, size.total_experts)]
    starts: Any = [getattr(layer, PREFIX + name) for name in START_NAMES]
    if adapter in starts[0]:
        a, b = (start[adapter].weight.detach().double() for start in starts)
        pairs.append(Pair(a=a, b=-size.scale / size.num_experts * b))
    return stack(pairs) if pairs else None


def is_unrouted(layer: MoeLoraLinear, adapter: str) -> bool:
    """Whether the layer holds one LoRA without a router."""
    return layer.moe_plans[adapter].placement == "unrouted"


def zero_pair(layer: MoeLoraLinear) -> Pair:
    """Return a pair of rank 1 that adds nothing."""
    device = next(layer.parameters()).device
    return Pair(
        a=torch.zeros(1, layer.in_features, dtype=torch.float64, device=device),
        b=torch.zeros(layer.out_features, 1, dtype=torch.float64, device=device),
    )
