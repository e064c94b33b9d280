"""Routers that start from data: k-means of their own inputs.

Letters: D width of the routed input, E experts, N inputs.

Source: Dhillon and Modha 2001, "Concept Decompositions for Large Sparse Text Data Using
Clustering", section 2.4 (spherical k-means); Arthur and Vassilvitskii 2007, "k-means++".
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from moeadapt.errors import ConfigError
from moeadapt.routers import Router
from moeadapt.routing import TokenContext
from moeadapt.tuner.inspect import require_context


def init_routers_kmeans(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    max_tokens: int = 2048,
    steps: int = 20,
    seed: int = 0,
) -> None:
    """Start each active router's gate from the clusters of its own inputs (spherical k-means).

    Gate row e becomes the direction of cluster e, less the mean of all of them, so that the logits
    of a token sum to zero; the rows keep the average length they had. Learned biases become zero.
    Padding is left out. The model runs in eval mode, without gradient.

    Args:
        model: the model with an adapter, in any wrapper.
        batches: keyword arguments of forwards, for example tokenised batches.
        max_tokens: inputs kept per router, the first ones, >= the number of experts; each takes
            4 * D bytes of CPU memory per router.
        steps: Lloyd iterations, >= 1.
        seed: of the choice of the first centres; same inputs and seed, same gates.

    Raises:
        ConfigError: the model has no moeadapt adapter, a router has no gate with a row per expert,
            or saw fewer real or distinct tokens than it has experts. No gate has been changed then.

    Example:
        >>> moeadapt.init_routers_kmeans(model, [tokenizer(texts, return_tensors="pt")])
    """
    if max_tokens < 1 or steps < 1:
        raise ConfigError(f"max_tokens={max_tokens} and steps={steps} must be at least 1")
    heads = {
        f"{adapter}/{name}": head.router
        for adapter, found in require_context(model).heads.items()
        if adapter in _active(model)
        for name, head in found.items()
    }
    for name, router in heads.items():
        _check_gate(name, router)
    kept = _router_inputs(model, batches, heads, max_tokens)
    gates = {}
    for name, inputs in kept.items():
        x = torch.cat(inputs) if inputs else torch.zeros(0, 1)
        if len(x) < heads[name].num_experts:
            raise ConfigError(
                f"router {name!r} saw {len(x)} real tokens, fewer than its "
                f"{heads[name].num_experts} experts; give more batches or raise max_tokens"
            )
        generator = torch.Generator().manual_seed(seed)
        gates[name] = spherical_kmeans(x, heads[name].num_experts, steps, generator)
        _check_distinct(name, gates[name])
    for name, centres in gates.items():
        _set_gate(heads[name], centres)


def spherical_kmeans(
    x: Float[Tensor, "N D"], num_experts: int, steps: int, generator: torch.Generator
) -> Float[Tensor, "E D"]:
    """Return unit centres of the directions of `x`: k-means++ start, then Lloyd iterations."""
    x = nn.functional.normalize(x.float(), dim=-1)
    centres = x[torch.randint(len(x), (1,), generator=generator)]
    for _ in range(1, num_experts):
        distance = (1 - (x @ centres.T).amax(-1)).clamp(min=0) + 1e-12
        centres = torch.cat([centres, x[torch.multinomial(distance, 1, generator=generator)]])
    for _ in range(steps):
        cosine = x @ centres.T
        own = torch.nn.functional.one_hot(cosine.argmax(-1), num_experts).to(x.dtype)
        centres = nn.functional.normalize(own.T @ x, dim=-1)
        empty = own.sum(0) == 0
        # An empty cluster takes over the inputs that fit worst.
        worst = cosine.amax(-1).argsort()[: int(empty.sum())]
        centres[empty] = x[worst]
    return centres


def _check_distinct(name: str, centres: Float[Tensor, "E D"]) -> None:
    cosine = centres @ centres.T - torch.eye(len(centres))
    if len(centres) > 1 and cosine.max() > 1 - 1e-6:
        raise ConfigError(
            f"router {name!r}: its inputs have fewer distinct directions than it has experts "
            f"({len(centres)}), so clusters coincide; give batches with other tokens"
        )


def _router_inputs(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    heads: Mapping[str, Router],
    max_tokens: int,
) -> dict[str, list[Tensor]]:
    kept: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        kept[name] = []

        def hook(router: nn.Module, args: tuple[Tensor, TokenContext]) -> None:
            hidden, tokens = args
            features = router.features(hidden)  # type: ignore[operator]
            real = features if tokens.mask is None else features[tokens.mask]
            room = max_tokens - sum(len(x) for x in kept[name])
            if room > 0:
                kept[name].append(real[:room].detach().cpu())

        return hook

    handles = [heads[name].register_forward_pre_hook(keep(name)) for name in heads]
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            for batch in batches:
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():  # a parent comes before its children
            module.train(mode)
    return kept


def _active(model: nn.Module) -> set[str]:
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return {name for layer in layers for name in layer.active_adapters}


def _check_gate(name: str, router: Router) -> None:
    shape = tuple(getattr(router, "weight", torch.empty(0)).shape)
    fits = router.gate_per_expert and shape[0] == router.num_experts
    if not fits or router.per != "token":
        raise ConfigError(
            f"router {name!r} is a {type(router).__name__} with per={router.per!r} and a gate of "
            f"shape {list(shape)}; k-means gives one row to each of {router.num_experts} experts "
            "of a router that decides per token, such as top_k"
        )


def _set_gate(router: Any, centres: Float[Tensor, "E D"]) -> None:
    rows = centres - centres.mean(0)
    with torch.no_grad():
        length = router.weight.norm(dim=-1).mean().to(rows)
        scale = length / rows.norm(dim=-1).mean().clamp(min=torch.finfo(rows.dtype).tiny)
        router.weight.copy_(rows * scale)
        if router.bias is not None:
            router.bias.zero_()
