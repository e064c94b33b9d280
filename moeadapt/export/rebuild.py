"""A mixture made anew with other experts in each router's list: settings, factors and routers.

Letters: E experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from moeadapt.errors import UnsupportedError
from moeadapt.experts import EXPERTS, ExpertBank
from moeadapt.export.bank_layout import EXPERT_AXES, columns, expert_pair, is_unrouted
from moeadapt.export.low_rank import stack, truncate
from moeadapt.routers import ROUTERS, Router
from moeadapt.tuner.adapter_layer import PREFIX
from moeadapt.tuner.config import MoeLoraConfig
from moeadapt.tuner.layer import MoeLoraLinear
from moeadapt.tuner.plain import adapter_layers, shared_base

Sources = Sequence[tuple[int, float]]
"""Old experts that one new expert is the weighted sum of; none: it starts afresh."""

Orders = Mapping[str, Sequence[Sources]]
"""Layer or block that routes -> what each of its new experts is made of."""

_GATE = frozenset({"weight", "bias", "noise_weight", "selection_bias"})
_ROUTER_ROWS: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(
        (
            "expert_choice",
            "gumbel",
            "random",
            "relu",
            "sigmoid",
            "soft",
            "sparsegen",
            "sparsemax",
            "switch",
            "threshold",
            "top_k",
            "top_p",
            "uniform",
        ),
        _GATE,
    ),
    "cosine": frozenset({"embeddings", "selection_bias"}),
    "dynamic": _GATE | {"threshold", "alive", "seen_uses"},
}
"""Router -> its tensors with a row per expert; the others belong to no expert."""

_EXPERTS = ("lora", "heterogeneous", "shared_a", "shared_b")


def check_editable(config: MoeLoraConfig) -> None:
    """Refuse an adapter whose experts cannot be exchanged one by one.

    Raises:
        UnsupportedError: says which setting, why, and what works instead.
    """
    router, experts = ROUTERS.name_of(config.router_config), EXPERTS.name_of(config.expert_config)
    reason = None
    if config.placement == "glu":
        reason = "placement='glu' has experts that are small FFNs"
    elif experts not in _EXPERTS:
        reason = f"experts={experts!r} are not one pair of matrices per expert"
    elif router not in _ROUTER_ROWS:
        reason = f"router={router!r} has no row per expert that could be moved, added or left out"
    elif config.experts_pattern is not None:
        reason = "experts_pattern gives the layers different numbers of experts"
    elif config.granularity > 1:
        reason = f"granularity={config.granularity} cuts experts into parts that belong together"
    elif config.init_lora_weights == "svd_segments":
        reason = "init_lora_weights='svd_segments' ties the base to the experts it started with"
    if reason is not None:
        raise UnsupportedError(
            f"cannot edit single experts: {reason}. This works with experts {list(_EXPERTS)} and "
            f"routers {sorted(_ROUTER_ROWS)} of one number of experts; otherwise train anew, from "
            "moeadapt.split and moeadapt.init_from_adapters where experts are matrices."
        )


def router_rows(config: MoeLoraConfig) -> frozenset[str]:
    """Return the names of the router's tensors that have a row per expert."""
    return _ROUTER_ROWS[ROUTERS.name_of(config.router_config)]


def head_of(layer: MoeLoraLinear, adapter: str) -> str:
    """Return the name of what routes for `layer`."""
    plan = layer.moe_plans[adapter]
    return plan.key if plan.block is None else plan.block.path


def heads(layers: Mapping[str, MoeLoraLinear], adapter: str) -> dict[str, list[str]]:
    """Return what routes -> the paths of the target linears it routes for."""
    found: dict[str, list[str]] = {}
    for key, layer in layers.items():
        if not is_unrouted(layer, adapter):
            found.setdefault(head_of(layer, adapter), []).append(key)
    return found


def rebuild(
    model: PeftModel, adapter: str, orders: Orders, router: Mapping[str, Any] | None = None
) -> PeftModel:
    """Return a new model with the experts of `orders`, over the same base tensors.

    Args:
        model: the mixture; it stays as it is.
        adapter: which adapter; it is called `default` in the new model.
        orders: for every router, as many experts each.
        router: settings of the router that change.

    Raises:
        ConfigError: the router does not fit the new number of experts.
        UnsupportedError: experts of different ranks in different orders per layer.
    """
    config: Any = model.peft_config[adapter]
    (count,) = {len(order) for order in orders.values()}
    new_config = replace(
        config,
        num_experts=count,
        router={**config.router, **(router or {})},
        experts=_ranks(config, orders),
        target_modules=_plain(config.target_modules),
        exclude_modules=_plain(config.exclude_modules),
        inference_mode=False,
    )
    flags = {id(p): p.requires_grad for p in model.parameters()}
    new: Any = get_peft_model(shared_base(model), new_config)
    for parameter in model.parameters():
        parameter.requires_grad_(flags[id(parameter)])
    new.peft_config["default"].base_model_name_or_path = config.base_model_name_or_path
    rest = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    rest = {k: v.detach().clone() for k, v in rest.items() if f".{PREFIX}" not in k}
    if rest:
        set_peft_model_state_dict(new, rest)
    old_layers, new_layers = adapter_layers(model, adapter), adapter_layers(new)
    with torch.no_grad():
        for key, layer in old_layers.items():
            order = orders.get(head_of(layer, adapter), ())
            _fill(layer, new_layers[key], adapter, order)
            if adapter in layer.moe_heads:
                routers = (
                    layer.moe_heads[adapter].router,
                    new_layers[key].moe_heads["default"].router,
                )
                _fill_router(*routers, router_rows(config), order)
    return new.eval()


def _ranks(config: MoeLoraConfig, orders: Orders) -> dict[str, Any]:
    """Return the settings of the experts, their ranks in the new order."""
    experts: Any = dict(config.experts)  # type: ignore[arg-type]
    ranks = experts.get("ranks")
    if ranks is None:
        return experts
    found = {
        tuple(ranks[order[0][0]] if order else config.r for order in head)
        for head in orders.values()
    }
    if len(found) > 1:
        raise UnsupportedError(
            f"experts 'heterogeneous' with ranks={ranks} list one rank per expert for all layers, "
            "but the layers would keep experts of different ranks; name the same experts for all "
            "layers"
        )
    return {**experts, "ranks": list(found.pop())}


def _plain(names: Any) -> Any:
    return sorted(names) if isinstance(names, set) else names


def _fill(old: MoeLoraLinear, new: MoeLoraLinear, adapter: str, order: Sequence[Sources]) -> None:
    bank, target = old.moe_banks[adapter], new.moe_banks["default"]
    if is_unrouted(old, adapter):
        for name in bank.factor_names:
            target.factor(name).weight.copy_(bank.factor(name).weight)
        return
    shared = range(bank.size.num_experts, bank.size.total_experts)
    for e, sources in enumerate([*order, *(((s, 1.0),) for s in shared)]):
        _fill_expert(bank, target, e, sources)
    for name, axis in EXPERT_AXES[type(bank)].items():
        if axis is None:
            target.factor(name).weight.copy_(bank.factor(name).weight)


def _fill_expert(bank: ExpertBank, target: ExpertBank, expert: int, sources: Sources) -> None:
    axes, own = EXPERT_AXES[type(bank)], columns(target, expert)
    parts = {
        name: _part(target, name, axis, own) for name, axis in axes.items() if axis is not None
    }
    if not sources:
        # The last factor of its own at zero: it adds nothing until it is trained.
        list(parts.values())[-1].zero_()
    elif len(sources) == 1 and sources[0][1] == 1:
        for name, part in parts.items():
            part.copy_(_part(bank, name, axes[name], columns(bank, sources[0][0])))
    elif len(parts) == 1:
        ((name, part),) = parts.items()
        total: Any = sum(w * _part(bank, name, axes[name], columns(bank, e)) for e, w in sources)
        part.copy_(total)
    else:
        pairs = stack([expert_pair(bank, e) for e, _ in sources], [w for _, w in sources])
        pair = truncate(pairs, target.size.all_ranks[expert])
        parts["lora_A"].copy_(pair.a)
        parts["lora_B"].copy_(pair.b / target.size.scale)


def _part(bank: ExpertBank, name: str, axis: Any, own: slice) -> Tensor:
    return bank.factor(name).weight.detach().narrow(axis, own.start, own.stop - own.start)


def _fill_router(old: Router, new: Router, rows: frozenset[str], order: Sequence[Sources]) -> None:
    into = dict(new.named_parameters()) | dict(new.named_buffers())
    for name, tensor in (dict(old.named_parameters()) | dict(old.named_buffers())).items():
        if name not in rows:
            into[name].copy_(tensor)
            continue
        for e, sources in enumerate(order):
            if sources:
                into[name][e].copy_(_row(tensor, sources))
            elif tensor.dtype == torch.bool:
                into[name][e].fill_(True)
        # Null experts are the last rows.
        into[name][len(order) :].copy_(tensor[old.num_experts :])


def _row(tensor: Tensor, sources: Sources) -> Tensor:
    picked = [tensor[e] for e, _ in sources]
    if tensor.dtype == torch.bool:
        return torch.stack(picked).any(0)
    weights = [w for _, w in sources]
    return sum(w * row for w, row in zip(weights, picked, strict=True)) / sum(weights)  # type: ignore[return-value]
