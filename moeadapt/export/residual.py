"""What one linear of a mixture does on data, in second moments; how far a dense delta is from it.

At every target linear x is what the base linear reads and d what the adapter adds to its output.
With placement `ffn` a token comes in slots with routing weights q, which sum to one:

    gate, up:  x is the FFN's input,     d = sum_k q_k Delta_k x     (the mean over the slots)
    down:      x = sum_k q_k h_k,        d = sum_k q_k Delta_k h_k   (each slot's own activation h)

so base(x) + d is exactly what the layer gives, averaged where it gives one answer per slot.

The routed part of d is B g with the bank's B and the gated ranks g, so E[x x^T], E[g x^T] and
E[g g^T] are all there is to know, and no tensor has both an input and an output axis.

Letters: T tokens, D in, O out, E experts, R gated ranks.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moeadapt.dispatch import combine
from moeadapt.errors import UnsupportedError
from moeadapt.export.bank_layout import constant_pair, factor_of, is_unrouted
from moeadapt.routing import Routing
from moeadapt.tuner.inspect import collect_routing
from moeadapt.tuner.layer import MoeLoraLinear
from moeadapt.tuner.plain import Pair
from moeadapt.tuner.probe import Batch, call, evaluating


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Means over real tokens.

    Attributes:
        x_x: E[x x^T].
        g_x: E[g x^T].
        g_g: E[g g^T].
        weights: mean routing weight of each expert.
        up: B, with d_routed = B g.
        tokens: how many.
    """

    x_x: Float[Tensor, "D D"]
    g_x: Float[Tensor, "R D"]
    g_g: Float[Tensor, "R R"]
    weights: Float[Tensor, " E"]
    up: Float[Tensor, "O R"]
    tokens: int

    def norm(self, constant: Pair | None = None) -> float:
        """Return E|d|^2, what is constant included."""
        return self._distance(constant, None)

    def residual(self, merged: Pair, constant: Pair | None = None) -> float:
        """Return E|d - b a x|^2 / E|d|^2 of a dense delta: 0 is exact, 1 as good as none.

        An adapter that adds nothing is matched exactly or not at all: 0 or infinity.
        """
        total, left = self.norm(constant), self._distance(constant, merged)
        if total == 0:
            return 0.0 if left == 0 else float("inf")
        return left / total

    def _distance(self, constant: Pair | None, merged: Pair | None) -> float:
        """Return E|B g + constant x - merged x|^2, clipped at zero."""
        linear = [pair for pair in (constant, merged) if pair is not None]
        signs = [1.0] if constant is not None else []
        signs += [-1.0] if merged is not None else []
        total = ((self.up.T @ self.up) * self.g_g).sum()
        for sign, p in zip(signs, linear, strict=True):
            total = total + 2 * sign * ((self.up.T @ p.b) * (self.g_x @ p.a.T)).sum()
            for other, q in zip(signs, linear, strict=True):
                total = total + sign * other * ((p.b.T @ q.b) * (p.a @ self.x_x @ q.a.T)).sum()
        return max(float(total), 0.0)


class _Sums:
    """Adds up one layer's moments while batches run through the model."""

    def __init__(self, layer: MoeLoraLinear, adapter: str) -> None:
        self.layer, self.adapter = layer, adapter
        self.sums: list[Tensor] | None = None
        self.tokens = 0
        self.routings: Mapping[str, list[Routing]] = {}

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the layer."""
        plan = self.layer.moe_plans[self.adapter]
        name = plan.key if plan.block is None else plan.block.path
        if not self.routings.get(name):
            raise UnsupportedError(
                f"the router of {name!r} cannot be watched; measure a model that is not compiled"
            )
        routing = self.routings[name][-1]
        dtype = torch.promote_types(args[0].dtype, torch.float32)
        x_TD, g_TR = self._read(args[0].to(dtype), routing)
        weights_TE = routing.expert_weights.to(dtype)
        if routing.token_mask is not None:
            kept = routing.token_mask
            x_TD, g_TR, weights_TE = x_TD[kept], g_TR[kept], weights_TE[kept]
        new = [x_TD.T @ x_TD, g_TR.T @ x_TD, g_TR.T @ g_TR, weights_TE.sum(0)]
        # One batch in the precision of its products, many in double precision.
        if self.sums is None:
            self.sums = [part.double() for part in new]
        else:
            for total, part in zip(self.sums, new, strict=True):
                total += part
        self.tokens += x_TD.shape[0]

    def _read(self, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        """Return x and g of each token; shared experts take no part in g."""
        bank = self.layer.moe_banks[self.adapter]
        silent = (0, bank.size.num_shared)
        # Not `bank.scaled`, which gives shared experts a weight.
        scale = bank.size.scale
        if self.layer.moe_plans[self.adapter].placement != "ffn":
            x = x.reshape(-1, x.shape[-1])
            weights = nn.functional.pad(routing.expert_weights, silent) * scale
            return x, bank.gate(bank.down(x), weights.to(x.dtype))
        block = self.layer.moe_blocks[self.adapter]
        slots = block.routing(self.adapter).slots
        choice = nn.functional.pad(slots.choice, silent) * slots.weights.unsqueeze(-1) * scale
        if block.is_input(x):
            x = x.reshape(-1, x.shape[-1])
            hidden = bank.down(x)
            hidden = hidden.unsqueeze(0).expand(choice.shape[0], *hidden.shape)
            return x, bank.gate(hidden, choice.to(x.dtype)).sum(0)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        return combine(x, slots), bank.gate(bank.down(x), choice.to(x.dtype)).sum(0)

    def moments(self) -> Moments | None:
        """Return the means; None: no real token came by."""
        if self.sums is None or not self.tokens:
            return None
        x_x, g_x, g_g, weights = (total / self.tokens for total in self.sums)
        up = factor_of(self.layer.moe_banks[self.adapter], "lora_B")
        return Moments(x_x=x_x, g_x=g_x, g_g=g_g, weights=weights, up=up, tokens=self.tokens)


def measure(
    model: nn.Module,
    layers: Mapping[str, MoeLoraLinear],
    batches: Iterable[Batch],
    *,
    adapter: str = "default",
    memory: float = 4e9,
) -> Iterator[tuple[str, Moments]]:
    """Run `batches` through the mixture and yield each routed layer's moments, in order.

    Args:
        model: the mixture.
        layers: what `adapter_layers` returned.
        batches: what `read_batches` returned; run once per group of layers.
        adapter: the active adapter.
        memory: bytes that the moments of one group of layers may take.

    Raises:
        UnsupportedError: the model is compiled, or a layer got no token.
    """
    routed = {k: layer for k, layer in layers.items() if not is_unrouted(layer, adapter)}
    for group in _groups(routed, memory):
        sums = {key: _Sums(routed[key], adapter) for key in group}
        with evaluating(model), _watching(sums.values()):
            for batch in batches:
                with collect_routing(model) as routings:
                    for one in sums.values():
                        one.routings = routings
                    call(model, batch)
        for key, one in sums.items():
            moments = one.moments()
            if moments is None:
                raise UnsupportedError(
                    f"no token of the data reached {key!r}; is adapter {adapter!r} active?"
                )
            one.sums = None
            yield key, moments


def _groups(layers: Mapping[str, MoeLoraLinear], memory: float) -> list[list[str]]:
    groups: list[list[str]] = []
    used = 0.0
    for key, layer in layers.items():
        size = 8.0 * layer.in_features**2
        if not groups or used + size > memory:
            groups.append([])
            used = 0.0
        groups[-1].append(key)
        used += size
    return groups


@contextmanager
def _watching(sums: Iterable[_Sums]) -> Iterator[None]:
    handles = [one.layer.register_forward_hook(one) for one in sums]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def constants(layers: Mapping[str, MoeLoraLinear], adapter: str) -> dict[str, Pair | None]:
    """Return what does not depend on the routing, per layer."""
    return {key: constant_pair(layer, adapter) for key, layer in layers.items()}
