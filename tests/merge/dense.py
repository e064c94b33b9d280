"""What a mixture does at each linear, computed expert by expert from full matrices."""

from typing import Any

import torch
from torch import Tensor, nn

from moeadapt import collect_routing
from moeadapt.tuner.plain import adapter_layers

SEEDS = range(4)


def deltas(layer: Any) -> list[Tensor]:
    """Return the matrix of every expert, the shared ones last."""
    bank = layer.moe_banks["default"]
    return [bank.delta_weight(e).detach().double() for e in range(bank.size.total_experts)]


def always(layer: Any) -> Tensor:
    """Return the sum of what is always on."""
    first = 0 if layer.moe_plans["default"].placement == "unrouted" else num_experts(layer)
    own = deltas(layer)
    return sum(own[first:], torch.zeros_like(own[0]))


def num_experts(layer: Any) -> int:
    """Return the number of routed experts."""
    return layer.moe_banks["default"].size.num_experts


def weight_of(layer: Any) -> Tensor:
    """Return the base weight, [out, in]."""
    return layer.get_base_layer().weight.detach().double()


def observed(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Return x, d and the routing weights of every real token, per routed linear of a llama."""
    layers = {k: m for k, m in adapter_layers(model).items() if _routed(m)}
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {key: [] for key in layers}
    for inputs in batches:
        seen: dict[str, Tensor] = {}
        handles = [_remember(m, seen, k) for k, m in layers.items()]
        with torch.no_grad(), collect_routing(model) as routings:
            model(**inputs)
        for handle in handles:
            handle.remove()
        real = inputs["attention_mask"].bool().flatten()
        for key, layer in layers.items():
            plan = layer.moe_plans["default"]
            name = plan.key if plan.block is None else plan.block.path
            weights = routings[name][0].expert_weights.double()
            if plan.placement == "ffn":
                x, d = _in_ffn(layers, key, seen, weights)
            else:
                x = seen[key].reshape(-1, layer.in_features).double()
                d = x @ always(layer).T + _mixed(layer, x, weights)
            found[key].append((x[real], d[real], weights[real]))
    return {key: tuple(map(torch.cat, zip(*parts, strict=True))) for key, parts in found.items()}


def _routed(layer: Any) -> bool:
    return layer.moe_plans["default"].placement != "unrouted"


def _remember(layer: Any, seen: dict[str, Tensor], key: str) -> Any:
    return layer.register_forward_pre_hook(lambda module, args: seen.update({key: args[0]}))


def _mixed(layer: Any, x: Tensor, weights: Tensor) -> Tensor:
    own = deltas(layer)[: num_experts(layer)]
    return sum(weights[:, e : e + 1] * (x @ delta.T) for e, delta in enumerate(own))


def _in_ffn(
    layers: dict[str, Any], key: str, seen: dict[str, Tensor], weights: Tensor
) -> tuple[Tensor, Tensor]:
    path, _, name = key.rpartition(".")
    gate, up, down = (layers[f"{path}.{part}_proj"] for part in ("gate", "up", "down"))
    x = seen[f"{path}.gate_proj"].reshape(-1, gate.in_features).double()
    if name != "down_proj":
        return x, x @ always(layers[key]).T + _mixed(layers[key], x, weights)

    def hidden(expert: int | None) -> Tensor:
        projected = []
        for layer in (gate, up):
            weight = weight_of(layer) + always(layer)
            if expert is not None:
                weight = weight + deltas(layer)[expert]
            projected.append(x @ weight.T)
        return torch.nn.functional.silu(projected[0]) * projected[1]

    own = [hidden(e) for e in range(weights.shape[1])]
    rest = 1 - weights.sum(1, keepdim=True)
    read = rest * hidden(None) + sum(weights[:, e : e + 1] * h for e, h in enumerate(own))
    added = sum(weights[:, e : e + 1] * (h @ deltas(down)[e].T) for e, h in enumerate(own))
    return read, added + read @ always(down).T
