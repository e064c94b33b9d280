"""What-if routing: force, ban or swap experts, or replace the router, without changing the model.

Letters: T tokens, E experts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from moeadapt.errors import ConfigError
from moeadapt.routing import Routing, select_top_k
from moeadapt.tuner.inspect import heads_of, require_context

Edit = Callable[[str, Routing], Float[Tensor, "T E"]]
RouterOverride = Literal["uniform", "random", "shuffled"]


@contextmanager
def override_routing(
    model: nn.Module,
    *,
    force: int | Sequence[int] | None = None,
    ban: int | Sequence[int] | None = None,
    k: int | None = None,
    router: str | None = None,
    swap: tuple[int, int] | None = None,
    edit: Edit | None = None,
    layers: Sequence[str] | None = None,
    seed: int = 0,
) -> Iterator[None]:
    """Route differently inside the `with` block; the model and its routers are not changed.

    What a token's weights sum to stays as the router made it (but for `edit`): an override says
    only which experts share it. Null experts keep what they have. For analyses without
    `torch.compile` and without gradient checkpointing, which would route again outside the block.
    A block inside another one replaces it.

    Args:
        model: the model, in any wrapper.
        force: these experts, in equal shares, for every token.
        ban: never these; a token's next most probable experts take their places, and its experts
            share the weight by their probabilities. Tokens that use none of them stay as they are.
        k: this many experts per token, the most probable ones, weighted by their probabilities.
        router: `uniform`: every expert in equal shares; `random`: the token's weights on experts
            drawn at random; `shuffled`: each token gets the weights of another token of the batch
            (padding stays apart).
        swap: tokens of the first expert go to the second, and the other way round.
        edit: `edit(layer, routing)` returns the weights to use, [T, E].
        layers: the layers or blocks to override, named as by `collect_routing`; None: all.
        seed: of `random` and `shuffled`; the same seed routes the same tokens alike.

    Raises:
        ConfigError: the model has no moeadapt adapter; nothing or contradictory things are asked
            for; an expert, `k` or a layer does not exist.

    Example:
        >>> with moeadapt.override_routing(model, ban=0):
        ...     without_expert_0 = model(input_ids=input_ids).logits
    """
    context = require_context(model)
    override = Override(
        force=_experts("force", force),
        ban=_experts("ban", ban),
        k=k,
        router=router,
        swap=_experts("swap", swap),
        edit=edit,
        layers=None if layers is None else frozenset(layers),
        seed=seed,
    )
    override.check(_experts_of_active(model))
    outer, context.override = context.override, override
    try:
        yield
    finally:
        context.override = outer


@dataclass(frozen=True, kw_only=True)
class Override:
    """The arguments of `override_routing`, applied to one routing after the other."""

    force: tuple[int, ...] | None
    ban: tuple[int, ...] | None
    k: int | None
    router: str | None
    swap: tuple[int, ...] | None
    edit: Edit | None
    layers: frozenset[str] | None
    seed: int
    _generators: dict[torch.device, torch.Generator] = field(default_factory=dict, repr=False)

    def concerns(self, layer: str) -> bool:
        """Whether the routing of `layer` is overridden."""
        return self.layers is None or layer in self.layers

    def check(self, experts: dict[str, int]) -> None:
        """Refuse what cannot be done; `experts`: of each layer."""
        kinds = {
            "force": self.force,
            "router": self.router,
            "swap": self.swap,
            "edit": self.edit,
            "ban or k": self.ban if self.ban is not None else self.k,
        }
        asked = [name for name, value in kinds.items() if value is not None]
        if len(asked) != 1:
            raise ConfigError(
                f"override_routing takes one of force, router, swap, edit, or ban and k together; "
                f"got {' and '.join(asked) or 'none'}"
            )
        if self.swap is not None and len(self.swap) != 2:  # noqa: PLR2004
            raise ConfigError(f"swap={self.swap} must be two experts")
        if self.edit is not None and not callable(self.edit):
            raise ConfigError(f"edit={self.edit!r} must be a function of a layer and its routing")
        for name, number in (("k", self.k), ("seed", self.seed)):
            if number is not None and type(number) is not int:
                raise ConfigError(f"{name}={number!r} must be a whole number")
        if self.router is not None and self.router not in get_args(RouterOverride):
            names = ", ".join(get_args(RouterOverride))
            raise ConfigError(f"router={self.router!r} is no override; one of {names}")
        if self.layers is not None and (unknown := sorted(self.layers - set(experts))):
            raise ConfigError(f"no router at {unknown}; this model has {sorted(experts)}")
        for layer, number in experts.items():
            if self.concerns(layer):
                self._check_layer(layer, number)

    def _check_layer(self, layer: str, number: int) -> None:
        for name in ("force", "ban", "swap"):
            for expert in getattr(self, name) or ():
                if not 0 <= expert < number:
                    raise ConfigError(f"{name}={expert}: {layer} has the experts 0 to {number - 1}")
        if self.ban is not None and len(set(self.ban)) >= number:
            raise ConfigError(f"ban={list(self.ban)} leaves {layer} without experts")
        left = number - len(set(self.ban or ()))
        if self.k is not None and not 1 <= self.k <= left:
            raise ConfigError(f"k={self.k} must be from 1 to {left}, the experts of {layer}")

    def __call__(self, layer: str, routing: Routing) -> Routing:
        """Return the routing to use in the place of `routing`."""
        if not self.concerns(layer):
            return routing
        self._check_layer(layer, routing.num_experts)
        own = routing.expert_weights
        weights = self._weights(layer, routing, own)
        if weights.shape != own.shape:
            raise ConfigError(
                f"edit returned weights of shape {tuple(weights.shape)} for {layer}, whose are "
                f"{tuple(own.shape)}"
            )
        null = routing.weights[:, routing.num_experts :]
        weights = torch.cat([weights.to(own.dtype), null], -1)
        return replace(routing, weights=weights, max_active=routing.num_experts)

    def _weights(self, layer: str, routing: Routing, own: Tensor) -> Float[Tensor, "T E"]:
        if self.edit is not None:
            return self.edit(layer, routing)
        if self.force is not None:
            chosen = torch.zeros_like(own, dtype=torch.bool)
            chosen[:, list(self.force)] = True
            return _share(own, chosen.to(own.dtype))
        if self.swap is not None:
            order = list(range(own.shape[1]))
            a, b = self.swap
            order[a], order[b] = order[b], order[a]
            return own[:, order]
        if self.router == "uniform":
            return _share(own, torch.ones_like(own))
        if self.router is not None:
            return self._random(own, routing.token_mask)
        return self._among_others(routing, own)

    def _random(
        self, own: Float[Tensor, "T E"], mask: Bool[Tensor, " T"] | None
    ) -> Float[Tensor, "T E"]:
        if own.device not in self._generators:
            self._generators[own.device] = torch.Generator(own.device).manual_seed(self.seed)
        generator = self._generators[own.device]
        if self.router == "random":
            drawn = torch.rand(own.shape, device=own.device, generator=generator)
            return own.gather(1, drawn.argsort(-1))
        drawn = torch.rand(len(own), device=own.device, generator=generator)
        if mask is None:
            return own[drawn.argsort()]
        # Real tokens come first in both orders, so they trade among themselves, and padding too.
        pad = (~mask).to(drawn.dtype) * 2
        source, target = (drawn + pad).argsort(), pad.argsort(stable=True)
        return own[torch.empty_like(source).scatter_(0, target, source)]

    def _among_others(self, routing: Routing, own: Tensor) -> Float[Tensor, "T E"]:
        """Let the most probable experts that are allowed share the token's weight."""
        probs = routing.probs[:, : routing.num_experts]
        banned = torch.zeros(own.shape[1], dtype=torch.bool, device=own.device)
        if self.ban is not None:
            banned[list(self.ban)] = True
        if self.k is None:
            # What the router chose comes first: a selection bias may set it apart from `probs`.
            rank = torch.where(banned, -torch.inf, probs + (own != 0).to(probs))
        else:
            rank = torch.where(banned, -torch.inf, probs)
        order = torch.argsort(rank, dim=-1, descending=True, stable=True).argsort(-1)
        if self.k is None:
            keep = order < (own != 0).sum(-1, keepdim=True)
        else:
            keep = select_top_k(rank, self.k)
        keep = keep & ~banned
        parts = torch.where(keep, probs, torch.zeros_like(probs))
        # Where none of them has any probability, they share equally.
        shared = torch.where(parts.sum(-1, keepdim=True) == 0, keep.to(probs), parts)
        if self.k is not None:
            return _share(own, shared)
        touched = ((own != 0) & banned).any(-1, keepdim=True)
        return torch.where(touched, _share(own, shared), own)


def _experts_of_active(model: nn.Module) -> dict[str, int]:
    """Return layer -> its number of experts: other adapters may have others, and do not run."""
    active = {
        name
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
        for name in module.active_adapters
    }
    return {
        head.name: head.router.num_experts
        for name, head in heads_of(model).items()
        if name.removesuffix(f"/{head.name}") in active
    }


def _share(own: Float[Tensor, "T E"], parts: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """Divide what each token's weights sum to as `parts` are to each other."""
    total = parts.sum(-1, keepdim=True)
    shares = parts / torch.where(total == 0, torch.ones_like(total), total)
    return own.sum(-1, keepdim=True) * shares


def _experts(name: str, given: int | Sequence[int] | None) -> tuple[int, ...] | None:
    if given is None:
        return None
    experts: list[object] = [given]
    if isinstance(given, Sequence) and not isinstance(given, str):
        experts = list(given)
    # Not isinstance: True and False are no experts.
    if not experts or not all(type(expert) is int for expert in experts):
        raise ConfigError(f"{name}={given!r} must be an expert or a non-empty list of experts")
    return tuple(expert for expert in experts if isinstance(expert, int))
