"""How many experts of which rank each target linear gets, decided and checked before injection."""

import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from peft.utils import resolve_quantization_backend
from peft.utils.other import get_pattern_key
from torch import nn

from moeadapt.errors import ConfigError
from moeadapt.experts import EXPERTS, BankSize
from moeadapt.routers import ROUTERS, RouterConfig
from moeadapt.tuner.config import MoeLoraConfig
from moeadapt.tuner.plan import TargetPlan, in_out_features


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
    _check_pattern_matches(config, plans)
    _check_blocks(plans, sizes)
    check_router(config, {s.num_experts for k, s in sizes.items() if _routed(plans[k])})
    for key, size in sizes.items():
        if _routed(plans[key]):
            config.expert_config.check(size)
        if config.init_lora_weights == "svd_segments":
            _check_segments(key, size, model.get_submodule(key), quantization)
    _check_losses(config, {size for key, size in sizes.items() if _routed(plans[key])})
    _check_hidden(config, plans)
    return sizes


def check_settings(config: MoeLoraConfig) -> int:
    """Check what can be checked about the sizes without a model.

    Returns:
        The smallest number of routed experts that the settings name.

    Raises:
        ConfigError: says which settings contradict each other.
    """
    experts, name = config.expert_config, EXPERTS.name_of(config.expert_config)
    reason = experts.refusal(config.placement)
    if reason is not None:
        raise ConfigError(
            f"experts {name!r} do not work with placement={config.placement!r}: {reason}. Use "
            "placement='linear'."
        )
    if name == "ia3" and config.lora_dropout:
        raise ConfigError(
            f"lora_dropout={config.lora_dropout} has no effect on experts 'ia3', which do not read "
            "the input; use lora_dropout=0"
        )
    _check_init(config, name)
    if config.granularity > 1 and name in ("heterogeneous", "rank1"):
        raise ConfigError(
            f"granularity={config.granularity} does not go with experts {name!r}, which set the "
            "rank of each expert themselves; use granularity=1"
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
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the config has warned already
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
    rank = _matching(config.rank_pattern, plan.key, config.r)
    in_features, out_features = in_out_features(model.get_submodule(plan.key))
    if _routed(plan):
        count = _num_experts(model, config, plan.key)
        size = _routed_size(config, count, rank, in_features, out_features)
    else:
        size = BankSize(
            in_features=in_features, out_features=out_features, num_experts=1, rank=rank
        )
    if config.init_lora_weights == "svd_segments":
        return replace(size, scale=svd_scale(size))
    alpha = _matching(config.alpha_pattern, plan.key, config.lora_alpha)
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
        return _matching(pattern, key, config.num_experts)
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


def _matching(pattern: Mapping[str, Any], key: str, default: Any) -> Any:
    return pattern.get(get_pattern_key(list(pattern), key), default)


def _routed(plan: TargetPlan) -> bool:
    return plan.placement != "unrouted"


def _check_pattern_matches(config: MoeLoraConfig, plans: Mapping[str, TargetPlan]) -> None:
    if not isinstance(config.experts_pattern, dict):
        return
    for pattern in config.experts_pattern:
        if not any(get_pattern_key([pattern], key) != key or pattern == key for key in plans):
            raise ConfigError(
                f"experts_pattern: {pattern!r} matches none of the {len(plans)} targets, such as "
                f"{next(iter(plans))!r}; a pattern is the end of a module path, or a regex for it"
            )


def _check_blocks(plans: Mapping[str, TargetPlan], sizes: Mapping[str, BankSize]) -> None:
    blocks: dict[str, dict[str, int]] = defaultdict(dict)
    for key, plan in plans.items():
        if plan.block is not None:
            blocks[plan.block.path][key] = sizes[key].num_experts
    for path, counts in blocks.items():
        if len(set(counts.values())) > 1:
            raise ConfigError(
                f"the linears of {path!r} share one routing but would have different numbers of "
                f"experts: {counts}. Give them one number in experts_pattern (and, with experts "
                "'rank1', one rank in rank_pattern), or use placement='linear' with "
                "router_scope='layer'."
            )


def _check_losses(config: MoeLoraConfig, sizes: Iterable[BankSize]) -> None:
    losses = config.balance_configs.values()
    if not losses:
        return
    router = router_config(config)
    for size in sizes:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")  # the router that is kept warns
            bank = config.expert_config.build(size)
            built = router.build(size.in_features, size.num_experts)
        for loss in losses:
            loss.check(built)
            loss.check_experts(bank)


def _check_hidden(config: MoeLoraConfig, plans: Mapping[str, TargetPlan]) -> None:
    """Refuse losses over expert features where no experts see what is routed."""
    reading = [name for name, loss in config.balance_configs.items() if loss.reads_hidden]
    for key, plan in plans.items():
        if reading and plan.block is not None and plan.block.first not in plans:
            raise ConfigError(
                f"balance loss {reading[0]!r} compares what experts make of the routed hidden "
                f"states, and the targets of {plan.block.path!r} (such as {key!r}) do not read "
                f"them; target {plan.block.first!r} too, or use router_scope='layer'"
            )


def _check_init(config: MoeLoraConfig, name: str) -> None:
    init = config.init_lora_weights
    named = init in ("gaussian", "orthogonal")
    if named and init not in config.expert_config.bank.inits:
        able = [n for n, cls in EXPERTS.items() if init in cls.bank.inits]
        raise ConfigError(
            f"init_lora_weights={init!r} does not go with experts {name!r}; use one of {able}"
        )
    plain = name == "lora" and not config.expert_config.model_dump()["orthogonalize"]
    if init == "svd_segments" and not plain:
        raise ConfigError(
            f"init_lora_weights='svd_segments' starts LoRA experts from the base weight; use "
            f"experts='lora' without options, not {config.experts!r}"
        )


def _check_segments(
    key: str, size: BankSize, target: nn.Module, quantization: Mapping[str, Any]
) -> None:
    segment = min(size.in_features, size.out_features) // size.num_experts
    if segment < size.rank:
        raise ConfigError(
            f"init_lora_weights='svd_segments': {key!r} is {size.in_features} -> "
            f"{size.out_features}, so each of its {size.num_experts} experts has {segment} "
            f"singular values to choose from, fewer than the rank {size.rank}; lower r or "
            "num_experts, or exclude the module"
        )
    base: Any = target.get_base_layer() if hasattr(target, "get_base_layer") else target  # type: ignore[operator]
    backend = resolve_quantization_backend(
        base, **{"get_apply_tensor_subclass": dict, **quantization}
    )
    if backend is not None and not backend.supports_merge:
        raise ConfigError(
            f"init_lora_weights='svd_segments' needs the weight of {key!r}, which "
            f"{backend.backend_name} cannot give back; use init_lora_weights=True"
        )
