"""The adapters that are compared on a real model, the same targets and the same scale in each.

The plain LoRAs come first, equal total rank before all: an untuned LoRA of an equal share of
parameters is the usual, and too weak, baseline.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

import moeadapt
from moeadapt import MoeLoraConfig
from moeadapt.routing import Routing

COMMON: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of every mixture: experts, one for each domain; rank of one, experts per token."""

    experts: int = 5
    rank: int = 8
    k: int = 2


FFN_PARAMETERS = 28
"""Rank with which a plain LoRA has as many parameters as `mixture_ffn`, on SmolLM2-135M."""


def lora(rank: int) -> LoraConfig:
    """Return a plain LoRA, whose scale is that of the mixtures."""
    return LoraConfig(r=rank, lora_alpha=2 * rank, **COMMON)


def mixture(sizes: Sizes, **fields: Any) -> MoeLoraConfig:
    """Return a mixture with one routing per block, top-k, unless `fields` say otherwise."""
    own = {
        "r": sizes.rank,
        "lora_alpha": 2 * sizes.rank,
        "num_experts": sizes.experts,
        "router": {"name": "top_k", "k": sizes.k},
        "router_scope": "block",
        "balance": {"switch": 0.01},
        **fields,
    }
    return MoeLoraConfig(**own, **COMMON)


def fixed(router: Any) -> dict[str, Any]:
    """Return the fields of a mixture whose router does not learn, and so needs no balance loss."""
    return {"router": router, "balance": None}


ARMS: dict[str, Callable[[Sizes], PeftConfig]] = {
    "lora_total": lambda s: lora(s.experts * s.rank),
    "lora_active": lambda s: lora(s.k * s.rank),
    "lora_ffn_params": lambda s: lora(FFN_PARAMETERS),
    "mixture_block": lambda s: mixture(s),
    "mixture_layer": lambda s: mixture(s, router_scope="layer"),
    "mixture_ffn": lambda s: mixture(s, placement="ffn"),
    "mixture_shared_a": lambda s: mixture(s, experts="shared_a"),
    "mixture_threshold": lambda s: mixture(s, router="threshold"),
    "mixture_top_p": lambda s: mixture(s, router={"name": "top_p", "p": 0.6}),
    "frozen_random_router": lambda s: mixture(
        s, **fixed({"name": "top_k", "k": s.k, "freeze": True, "init_std": 0.5})
    ),
    "uniform_router": lambda s: mixture(s, **fixed("uniform")),
    "oracle_routing": lambda s: mixture(s, **fixed("uniform")),
}
"""Equal parameters as a mixture with experts on every linear: `lora_total`, but for the routers."""


REDUCED = ("lora_total", "mixture_block", "frozen_random_router")
"""What fits half an hour on two cores of a CPU, the two worlds with it; `--arms` names others."""


def attach(arm: str, base: nn.Module, sizes: Sizes, seed: int) -> Any:
    """Return `base` with the adapter of an arm, initialised from `seed`."""
    torch.manual_seed(seed)
    model = get_peft_model(base, ARMS[arm](sizes))  # type: ignore[arg-type]
    if arm.startswith("lora"):
        return model
    moeadapt.set_aux_loss_scale(model, 1.0)
    return model


def routed(
    arm: str, model: nn.Module, domains: list[int], length: int, sizes: Sizes
) -> AbstractContextManager[None]:
    """Return a context in which `oracle_routing` sends each row to the expert of its domain.

    Args:
        arm: the arm; all others route by themselves.
        model: its model.
        domains: index of each row's domain; with more domains than experts they share.
        length: tokens of a row.
        sizes: of the mixture.
    """
    if arm != "oracle_routing":
        return nullcontext()
    rows = torch.tensor(domains).repeat_interleave(length) % sizes.experts

    def by_domain(_: str, routing: Routing) -> Tensor:
        return F.one_hot(rows, sizes.experts).to(routing.weights)

    return moeadapt.override_routing(model, edit=by_domain)
