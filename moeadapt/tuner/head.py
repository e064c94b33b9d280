"""One router at work in a model: routes, attaches the balance losses, counts.

Letters: T tokens, D width, E experts.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moeadapt import aux_loss, stats
from moeadapt.balance import BalanceConfig
from moeadapt.routers import Router
from moeadapt.routing import Routing
from moeadapt.tuner.context import RoutingContext


class RouterHead:
    """What a layer calls to have its tokens routed.

    A plain object: the router itself lives in the layer, in a `ModuleDict` entry per adapter, and
    is looked up at each use, since wrappers may replace it.

    Attributes:
        name: path of the layer or block it routes for.
        balance: the losses it attaches, by name.
    """

    def __init__(
        self,
        name: str,
        routers: nn.ModuleDict,
        adapter: str,
        balance: Mapping[str, BalanceConfig],
        context: RoutingContext,
    ) -> None:
        """Look at `routers[adapter]`."""
        self.name = name
        self.balance = dict(balance)
        self._routers = routers
        self._adapter = adapter
        self._context = context
        self._sink: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Counts belong to this run, not to a copy."""
        return {**self.__dict__, "_sink": None}

    @property
    def router(self) -> Router:
        """The router module."""
        return self._routers[self._adapter]  # type: ignore[return-value]

    def __call__(self, hidden: Float[Tensor, "*T D"]) -> Float[Tensor, "T E"]:
        """Return the weights of `hidden`'s tokens, with the balance losses attached."""
        router = self.router
        routing = router(hidden.reshape(-1, hidden.shape[-1]), self._context.tokens(hidden))
        collected = self._context.collected
        if collected is not None and not torch.compiler.is_compiling():
            collected.setdefault(self.name, []).append(routing.detach())
        if router.training and torch.is_grad_enabled():
            return self._attach(routing, hidden)
        return routing.weights

    def _attach(self, routing: Routing, hidden: Tensor) -> Float[Tensor, "T E"]:
        losses = [config.loss(routing) for config in self.balance.values()]
        total = routing.weights.new_zeros(())
        for config, loss in zip(self.balance.values(), losses, strict=True):
            total = total + config.coef * loss
        if total.requires_grad:
            self._context.check_scale(hidden, self.router)
        sink = self.sink(routing.weights.device)
        if sink is None:
            sink = torch.zeros_like(total)
            packed = sink
        else:
            packed = stats.pack(routing, losses)
        share = len(self._context.heads[self._adapter])
        weights = aux_loss.attach(
            routing.weights,
            total / share,
            scale=self._context.scale(total.device),
            stats=packed,
            sink=sink,
        )
        self._context.watch_backward(weights)
        return weights

    def sink(self, device: torch.device) -> Tensor | None:
        """Return the tensor whose `grad` collects the counts; None where it cannot be made.

        A compiled graph cannot create a leaf: `inspect.prepare_stats` does so beforehand.
        """
        if self._sink is None or self._sink.device != device:
            if torch.compiler.is_compiling():
                return None
            size = stats.packed_size(self.router.num_experts, len(self.balance))
            self._sink = torch.zeros(size, device=device, requires_grad=True)
        return self._sink

    def pop_counts(self) -> Float[Tensor, " S"] | None:
        """Return the sum of all counts since the last call, still on the device, and reset it."""
        if self._sink is None or self._sink.grad is None:
            return None
        counts, self._sink.grad = self._sink.grad, None
        return counts
