"""How many experts of which rank each target linear gets, decided and checked before injection."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from moeadapt.errors import ConfigError
from moeadapt.experts import EXPERTS, BankSize
from moeadapt.routers import ROUTERS, RouterConfig
from moeadapt.tuner.checks import (
    check_blocks,
    check_hidden,
    check_impl,
    check_init,
    check_losses,
    check_pattern_matches,
    check_patterns,
    check_placement,
    check_segments,
    matching,
)
from moeadapt.tuner.config import MoeLoraConfig
from moeadapt.tuner.plan import TargetPlan, in_out_features
from moeadapt.tuner.quiet import without_warnings


def plan_sizes(
    model: nn.Module,
    config: MoeLoraConfig,
    plans: Mapping[str, TargetPlan],
    quantization: Mapping[str, Any],
) -> dict[str, BankSize]:
    """Decide the sizes of each target's experts.

    Args:
        model: the base model, possibly with other adapters.
        config: the adapter to inject.
        plans: what `plan_targets` returned.
        quantization: what `peft.utils.get_quantization_kwargs(model)` returned.

    Raises:
        ConfigError: a count does not fit the router or the expert type, the targets of a block
            disagree, an initialisation cannot be made for a target, or a balance loss does not
            work with the router or the experts.
    """
    sizes = {key: _bank_size(model, config, plan) for key, plan in plans.items()}
    check_pattern_matches(config, plans)
    check_blocks(plans, sizes)
    check_router(config, {s.num_experts for k, s in sizes.items() if _routed(plans[k])})
    for key, size in sizes.items():
        if _routed(plans[key]):
            config.expert_config.check(size)
        if config.init_lora_weights == "svd_segments":
            check_segments(key, size, model.get_submodule(key), quantization)
    check_losses(
        config, router_config(config), {size for key, size in sizes.items() if _routed(plans[key])}
    )
    check_hidden(config, plans)
    return sizes


def check_settings(config: MoeLoraConfig) -> int:
    """Check what can be checked about the sizes without a model.

    Returns:
        The smallest number of routed experts that the settings name.

    Raises:
        ConfigError: says which settings contradict each other.
    """
    experts, name = config.expert_config, EXPERTS.name_of(config.expert_config)
    check_placement(config, name)
    check_impl(config, name)
    if name == "ia3" and config.lora_dropout:
        raise ConfigError(
            f"lora_dropout={config.lora_dropout} has no effect on experts 'ia3', which do not read "
            "the input; use lora_dropout=0"
        )
    check_init(config, name)
    if config.granularity > 1 and name in ("glu", "heterogeneous", "rank1"):
        raise ConfigError(
            f"granularity={config.granularity} does not go with experts {name!r}, which set the "
            f"{'width' if name == 'glu' else 'rank'} of each expert themselves; use granularity=1"
        )
    schedule = config.schedule_config
    if config.granularity > 1 and schedule and (schedule.k or schedule.k_inference):
        raise ConfigError(
            f"granularity={config.granularity} multiplies the router's k, and a schedule of k sets "
            "it; use granularity=1 with a larger num_experts and a smaller r"
        )
    pattern = config.experts_pattern
    if pattern is not None and not pattern:
        raise ConfigError(f"experts_pattern={pattern!r} is empty; leave it out, or name counts")
    counts = list(pattern) if isinstance(pattern, list) else [config.num_experts]
    counts += pattern.values() if isinstance(pattern, dict) else []
    sizes = [_routed_size(config, count, config.r, 1, 1) for count in counts]
    for size in sizes:
        experts.check(size)
    routed = {size.num_experts for size in sizes}
    check_router(config, routed)
    return min(routed)


def check_router(config: MoeLoraConfig, counts: Iterable[int]) -> None:
    """Check the router against every number of experts it will have.

    Raises:
        ConfigError: see `RouterConfig.check`, `ScheduleConfig.fit` and `router_config`.
    """
    router = router_config(config)
    schedule = config.schedule_config
    for count in sorted(counts):
        router.check(count)
        if schedule is not None:
            with without_warnings():  # the config has warned already
                schedule.fit(router, count)


def router_config(config: MoeLoraConfig) -> RouterConfig:
    """Return the router's settings, its `k` multiplied by the granularity.

    Raises:
        ConfigError: the router has no such number, or it cannot be changed.
    """
    router, parts = config.router_config, config.granularity
    if parts == 1:
        return router
    k = getattr(router, "k", None)
    try:
        if isinstance(k, (int, float)):
            return ROUTERS.parse({**ROUTERS.spec(router), "k": k * parts})
    except ConfigError:
        pass
    raise ConfigError(
        f"granularity={parts} uses {parts} times as many experts per token, but router "
        f"{ROUTERS.name_of(router)!r} has no k that could be multiplied. Use a router with a free "
        "k, such as top_k, or granularity=1 with a larger num_experts."
    )


def svd_scale(size: BankSize) -> float:
    """Return GOAT's scale, sqrt(3 * in / rank), see `moeadapt.tuner.segments`."""
    return math.sqrt(3 * size.in_features / size.rank)


def _bank_size(model: nn.Module, config: MoeLoraConfig, plan: TargetPlan) -> BankSize:
    rank = matching(config.rank_pattern, plan.key, config.r)
    in_features, out_features = in_out_features(model.get_submodule(plan.key))
    if plan.placement == "glu" and plan.block is not None:
        check_patterns(config, plan.key)
        count = _num_experts(model, config, plan.key)
        return _routed_size(config, count, rank, plan.block.dim, out_features)
    if _routed(plan):
        count = _num_experts(model, config, plan.key)
        size = _routed_size(config, count, rank, in_features, out_features)
    else:
        size = BankSize(
            in_features=in_features, out_features=out_features, num_experts=1, rank=rank
        )
    if config.init_lora_weights == "svd_segments":
        return replace(size, scale=svd_scale(size))
    alpha = matching(config.alpha_pattern, plan.key, config.lora_alpha)
    return replace(size, scale=alpha / (math.sqrt(rank) if config.use_rslora else rank))


def _routed_size(
    config: MoeLoraConfig, num_experts: int, rank: int, in_features: int, out_features: int
) -> BankSize:
    if rank % config.granularity:
        raise ConfigError(
            f"granularity={config.granularity} does not divide the rank {rank}; choose a divisor "
            "of r and of every rank in rank_pattern"
        )
    size = BankSize(
        in_features=in_features,
        out_features=out_features,
        num_experts=num_experts,
        num_shared=config.n_shared,
        rank=rank,
    )
    return config.expert_config.sized(size.split(config.granularity))


def _num_experts(model: nn.Module, config: MoeLoraConfig, key: str) -> int:
    pattern = config.experts_pattern
    if isinstance(pattern, dict):
        return matching(pattern, key, config.num_experts)
    position = _position(model, key) if pattern else None
    if pattern is None or position is None:
        return config.num_experts
    index, depth = position
    if depth % len(pattern):
        raise ConfigError(
            f"experts_pattern={pattern!r} lists {len(pattern)} groups of layers, which do not "
            f"divide the {depth} layers that hold {key!r}; list a divisor of {depth}, or give "
            "{pattern: num_experts}"
        )
    return pattern[index * len(pattern) // depth]


def _position(model: nn.Module, key: str) -> tuple[int, int] | None:
    """Return the index of the layer that holds `key`, and how many layers there are."""
    parts = key.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return int(part), len(list(model.get_submodule(".".join(parts[:i])).children()))
    return None


def _routed(plan: TargetPlan) -> bool:
    return plan.placement != "unrouted"
