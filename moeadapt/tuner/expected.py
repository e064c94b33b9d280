"""Which tensors the file of an adapter must hold on a base: names and shapes, nothing allocated."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from moeadapt.adapter_format.header import Header
from moeadapt.adapter_format.match import TensorSpec
from moeadapt.errors import AdapterFileError
from moeadapt.experts import BankSize
from moeadapt.routers import LinearRouter
from moeadapt.tuner.adapter_layer import PREFIX
from moeadapt.tuner.config import MoeLoraConfig
from moeadapt.tuner.plan import TargetPlan, experts_of
from moeadapt.tuner.quiet import without_warnings
from moeadapt.tuner.segments import make_start
from moeadapt.tuner.sizes import router_config
from moeadapt.tuner.tokens import token_modules

FILE_PREFIX = "base_model.model."
"""How PEFT starts every name in a file."""

TOKENS = "token_adapter.trainable_tokens_delta"

_READS_BASE = ("_A", "_router")
"""Ends of the names of what is as wide as the input of its linear; `_B`: as its output."""


def expected_tensors(
    model: nn.Module,
    config: MoeLoraConfig,
    plans: Mapping[str, TargetPlan],
    sizes: Mapping[str, BankSize],
) -> dict[str, TensorSpec]:
    """Return name -> what the tensor must be, for a file of an adapter that is to be injected.

    Args:
        model: the base model, possibly with other adapters.
        config: of the adapter.
        plans: what `moeadapt.tuner.plan.plan_targets` returned.
        sizes: what `moeadapt.tuner.sizes.plan_sizes` returned.
    """
    specs: dict[str, TensorSpec] = {}
    made: dict[Any, dict[str, TensorSpec]] = {}
    routed: set[str] = set()
    with without_warnings(), torch.device("meta"):  # the router that is kept warns
        for key, plan in plans.items():
            own = (sizes[key], plan.placement)
            if own not in made:
                made[own] = _bank(config, plan, sizes[key])
            parts = dict(made[own])
            block = plan.block
            if plan.placement == "linear" if block is None else block.path not in routed:
                routed |= {block.path} if block else set()
                dim = block.dim if block else sizes[key].in_features
                parts.update(_router(config, plan, sizes[key], dim))
            specs.update({f"{FILE_PREFIX}{key}.{name}": spec for name, spec in parts.items()})
    specs.update(_in_full(model, config))
    return specs


def _bank(config: MoeLoraConfig, plan: TargetPlan, size: BankSize) -> dict[str, TensorSpec]:
    experts = experts_of(config, plan)
    # Every type can start like this, and it is the cheapest; only shapes matter.
    factors = experts.bank.make_factors(size, "zero_b", experts)
    specs = {
        f"{PREFIX}{name}.weight": _factor_spec(name, factor.weight, size)
        for name, factor in factors.items()
    }
    if config.init_lora_weights == "svd_segments":
        for name, factor in make_start(size).items():
            specs[f"{PREFIX}{name}.weight"] = _factor_spec(name, factor.weight, size)
    return specs


def _factor_spec(name: str, weight: Tensor, size: BankSize) -> TensorSpec:
    base = 1 if name.endswith("_A") else 0 if name.endswith("_B") else None
    shape = tuple(weight.shape)
    grows = None if base is None or len(shape) != 2 else 1 - base  # noqa: PLR2004
    return TensorSpec(
        shape=shape,
        base_dim=base,
        expert_dim=grows,
        rank=size.rank if grows is not None and size.ranks is None else None,
    )


def _router(
    config: MoeLoraConfig, plan: TargetPlan, size: BankSize, dim: int
) -> dict[str, TensorSpec]:
    router = router_config(config).build(dim, size.num_experts)
    if isinstance(router, LinearRouter):
        router.set_costs((1.0,) * size.num_experts)
    for loss in config.balance_configs.values():
        loss.check(router)
        loss.prepare(router)
    return {
        f"{PREFIX}router.{name}": _router_spec(t, dim) for name, t in router.state_dict().items()
    }


def _router_spec(tensor: Tensor, dim: int) -> TensorSpec:
    shape = tuple(tensor.shape)
    base = len(shape) - 1 if len(shape) > 1 and shape[-1] == dim else None
    return TensorSpec(
        shape=shape,
        is_float=tensor.is_floating_point(),
        base_dim=base,
        expert_dim=0 if base is not None or len(shape) == 1 else None,
    )


def _in_full(model: nn.Module, config: MoeLoraConfig) -> Iterator[tuple[str, TensorSpec]]:
    """Find what `modules_to_save` and `trainable_token_indices` add, the way PEFT does."""
    ends = tuple(config.modules_to_save or ())
    tokens = token_modules(model, config)
    for key, module in model.named_modules(remove_duplicate=False):
        if ends and key.endswith(ends):
            inner: Any = (
                module.original_module if isinstance(module, ModulesToSaveWrapper) else module
            )
            for name, tensor in inner.state_dict().items():
                spec = TensorSpec(shape=tuple(tensor.shape), is_float=tensor.is_floating_point())
                yield f"{FILE_PREFIX}{key}.{name}", spec
    # Of layers tied to each other one is saved, and PEFT says which.
    tied = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    for key, ids in tokens.items():
        weight: Any = model.get_submodule(key).weight
        spec = TensorSpec(shape=(len(ids), weight.shape[-1]), required=len(tokens) == 1 or not tied)
        yield f"{FILE_PREFIX}{key}.{TOKENS}", spec


def check_plausible(config: MoeLoraConfig, header: Header, path: Any) -> None:
    """Refuse ranks and numbers of experts for which no tensor of the file is large enough.

    What the settings need is computed later, which takes time where the numbers are absurd.

    Raises:
        AdapterFileError: names both numbers.
    """
    largest = max((info.size for info in header.tensors.values()), default=0)
    said: list[tuple[str, Any]] = []
    for field in ("r", "num_experts", "n_shared", "granularity"):
        said.append((field, getattr(config, field)))
    for field in ("rank_pattern", "experts_pattern"):
        pattern = getattr(config, field)
        values = pattern.values() if isinstance(pattern, dict) else pattern or ()
        said.extend((field, value) for value in values)
    for field, value in said:
        if header.tensors and value > largest:
            raise AdapterFileError(
                f"{path}: its settings say {field}={value}, but its largest tensor holds {largest} "
                "numbers: take the adapter_config.json that was saved with it"
            )
