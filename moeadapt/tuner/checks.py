"""What an adapter's settings must agree on before a model is touched; each check names the cure."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
from peft.utils import resolve_quantization_backend
from torch import nn

from moeadapt.errors import ConfigError
from moeadapt.experts import EXPERTS, BankSize
from moeadapt.routers import RouterConfig
from moeadapt.tuner.config import MOST_PATTERNS, MoeLoraConfig
from moeadapt.tuner.plan import TargetPlan
from moeadapt.tuner.quiet import without_warnings


def matching(pattern: Mapping[str, Any], key: str, default: Any) -> Any:
    """Return the value of the first pattern that names `key`, else `default`."""
    for one, value in pattern.items():
        if _end_of_path(one).match(key):
            return value
    return pattern.get(key, default)


@lru_cache(maxsize=MOST_PATTERNS)
def _end_of_path(pattern: str) -> re.Pattern[str]:
    """Return what PEFT's `get_pattern_key` compiles anew for every key of a large table."""
    return re.compile(rf"(.*\.)?({pattern})$")


def check_impl(config: MoeLoraConfig, experts: str) -> None:
    """Refuse a form of computation that the placement or the experts do not have."""
    if config.impl in ("auto", "concat"):
        return
    plain = experts in ("lora", "rank1") and not getattr(
        config.expert_config, "orthogonalize", False
    )
    if config.placement != "linear" or not plain:
        raise ConfigError(
            f"impl={config.impl!r} is for placement='linear' and experts 'lora' (without "
            f"orthogonalize) or 'rank1', not placement={config.placement!r} with experts "
            f"{experts!r}; use impl='auto'"
        )


def check_pattern_matches(config: MoeLoraConfig, plans: Mapping[str, TargetPlan]) -> None:
    """Refuse a pattern for experts that names no target."""
    if not isinstance(config.experts_pattern, dict):
        return
    for pattern in config.experts_pattern:
        if not any(_end_of_path(pattern).match(key) or pattern == key for key in plans):
            raise ConfigError(
                f"experts_pattern: {pattern!r} matches none of the {len(plans)} targets, such as "
                f"{next(iter(plans))!r}; a pattern is the end of a module path, or a regex for it"
            )


def check_blocks(plans: Mapping[str, TargetPlan], sizes: Mapping[str, BankSize]) -> None:
    """Refuse linears that share a routing over different numbers of experts."""
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


def check_losses(config: MoeLoraConfig, router: RouterConfig, sizes: Iterable[BankSize]) -> None:
    """Refuse balance losses that do not work with the router or the experts."""
    losses = config.balance_configs.values()
    if not losses:
        return
    for size in sizes:
        with without_warnings(), torch.device("meta"):
            bank = config.expert_config.build(size)
            built = router.build(size.in_features, size.num_experts)
        for loss in losses:
            loss.check(built)
            loss.check_experts(bank)


def check_placement(config: MoeLoraConfig, name: str) -> None:
    """Refuse an expert type in a placement where it cannot work."""
    if config.placement == "glu" and name != "glu":
        raise ConfigError(
            "placement='glu' puts small FFNs beside the base FFN, and the other expert types "
            "change a single linear; use experts={'name': 'glu', 'dim': 128} (dim: width of one "
            "expert), or another placement"
        )
    reason = config.expert_config.refusal(config.placement)
    if reason is not None:
        works = "glu" if name == "glu" else "linear"
        raise ConfigError(
            f"experts {name!r} do not work with placement={config.placement!r}: {reason}. Use "
            f"placement={works!r}."
        )


def check_patterns(config: MoeLoraConfig, key: str) -> None:
    """Refuse ranks and alphas for experts that have neither."""
    for field in ("rank_pattern", "alpha_pattern"):
        value = matching(getattr(config, field), key, None)
        if value is not None:
            raise ConfigError(
                f"{field} gives {key!r} {value}, but experts 'glu' have no rank and no alpha: "
                "their options are dim and scale. Let the pattern name attention layers only."
            )


def check_hidden(config: MoeLoraConfig, plans: Mapping[str, TargetPlan]) -> None:
    """Refuse losses over expert features where no experts see what is routed."""
    reading = [name for name, loss in config.balance_configs.items() if loss.reads_hidden]
    for key, plan in plans.items():
        if reading and plan.block is not None and plan.block.first not in plans:
            raise ConfigError(
                f"balance loss {reading[0]!r} compares what experts make of the routed hidden "
                f"states, and the targets of {plan.block.path!r} (such as {key!r}) do not read "
                f"them; target {plan.block.first!r} too, or use router_scope='layer'"
            )


def check_init(config: MoeLoraConfig, name: str) -> None:
    """Refuse an initialisation that the expert type does not know."""
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


def check_segments(
    key: str, size: BankSize, target: nn.Module, quantization: Mapping[str, Any]
) -> None:
    """Refuse to start from segments of a base weight that has too few or cannot be read."""
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


def check_layers(config: MoeLoraConfig, names: Iterable[str]) -> None:
    """Refuse layers that the model does not have."""
    asked = config.layers_to_transform
    asked = [asked] if isinstance(asked, int) else asked or []
    if not asked:
        return
    parts = [[part for part in name.split(".") if part.isdigit()] for name in names]
    there = {int(numbers[0]) for numbers in parts if numbers}
    absent = sorted(set(asked) - there)
    if absent and there:
        raise ConfigError(
            f"layers_to_transform names layers {absent}, and this model has {min(there)} to "
            f"{max(there)}"
        )
