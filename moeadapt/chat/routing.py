"""The routing of one answer: which experts computed each of its tokens.

Letters: N tokens of the answer, E experts of a layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import StoppingCriteria

from moeadapt.routing import Routing


@dataclass(frozen=True, kw_only=True)
class LayerUse:
    """What one layer did with its experts during an answer.

    Attributes:
        load: share of the used slots per expert.
        effective_experts: exponential of the entropy of the load, from 1 to E.
        active: mean experts in use per token.
    """

    load: list[float]
    effective_experts: float
    active: float


@dataclass(frozen=True, kw_only=True)
class AnswerRouting:
    """Expert weights by which each token of an answer was computed.

    Row n belongs to the forward that produced token n, so to the position before it. An expert's
    number means something within its layer only: expert 3 of two layers are two experts.

    Attributes:
        names: paths of the layers or blocks.
        weights: of each of `names`, [N, E]; 0: not used.
    """

    names: tuple[str, ...]
    weights: tuple[Float[Tensor, "N _"], ...]

    def use(self, layer: int) -> LayerUse:
        """Return what layer number `layer` did."""
        used_NE = (self.weights[layer] != 0).double()
        load = used_NE.sum(0) / used_NE.sum().clamp(min=1)
        return LayerUse(
            load=load.tolist(),
            effective_experts=float(torch.special.entr(load).sum().exp()),
            active=float(used_NE.sum(-1).mean()),
        )

    def main(self, layer: int) -> tuple[Int[Tensor, " N"], Float[Tensor, " N"]]:
        """Return each token's expert with the largest weight, and its share of the weights."""
        sizes_NE = self.weights[layer].abs()
        largest_N, experts_N = sizes_NE.max(-1)
        return experts_N, largest_N / sizes_NE.sum(-1).clamp(min=torch.finfo(torch.float32).tiny)

    def to_dict(self) -> dict[str, Any]:
        """Return the use of every layer as JSON data."""
        return {name: vars(self.use(i)) for i, name in enumerate(self.names)}


class RoutingTrace(StoppingCriteria):
    """Keeps the weights of each token while `generate` runs, and drops everything else.

    `generate` asks it after every token; it never stops.
    """

    def __init__(self, routings: Mapping[str, list[Routing]]) -> None:
        """Read from `routings`, of `collect_routing`, and empty it token by token."""
        self._routings = routings
        self._names: tuple[str, ...] = ()
        self._widths: list[int] = []
        self._steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """See `transformers.StoppingCriteria`."""
        if not self._names:
            self._names = tuple(self._routings)
            self._widths = [x[-1].num_experts for x in self._routings.values()]
        rows = [self._routings[name][-1].expert_weights[-1].float() for name in self._names]
        if rows:
            # One vector for all layers: one wait for the device, one small tensor per token.
            self._steps.append(torch.cat(rows).cpu())
        for collected in self._routings.values():
            collected.clear()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def result(self) -> AnswerRouting | None:
        """Return the routing of the answer; None if nothing was routed."""
        if not self._steps:
            return None
        layers = torch.stack(self._steps).split(self._widths, dim=1)
        return AnswerRouting(names=self._names, weights=tuple(layers))
