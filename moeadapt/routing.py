"""The one value that flows from a router to everything else.

Letters: T tokens, E experts, W experts and null experts, K slots of a token.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenContext:
    """What a router may know about the tokens besides their hidden states.

    Attributes:
        mask: True for real tokens; padding (False) is routed but never counted. None: all real.
        sequences: number of the sequence that each token belongs to, 0 to T - 1; packed sequences
            have numbers of their own. Only for routers that need it.
        token_ids: vocabulary ids. Only for routers that need them.
    """

    mask: Bool[Tensor, " T"] | None = None
    sequences: Int[Tensor, " T"] | None = None
    token_ids: Int[Tensor, " T"] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """Which experts each token uses, and how much.

    All shapes are known before the data is: top-k, top-p, thresholds and soft routing are the same
    type, so nothing here waits for the device and nothing breaks a compiled graph.

    Attributes:
        logits: scores before the softmax.
        probs: rows sum to one.
        weights: what multiplies each expert's output; exactly 0 = not chosen.
        max_active: upper bound on the experts of one token, known from the config.
        token_mask: False for padding: computed, never counted.
        null_experts: how many of the last columns are null experts, which change nothing.
    """

    logits: Float[Tensor, "T W"]
    probs: Float[Tensor, "T W"]
    weights: Float[Tensor, "T W"]
    max_active: int
    token_mask: Bool[Tensor, " T"] | None = None
    null_experts: int = 0

    @property
    def num_experts(self) -> int:
        """E, without null experts."""
        return self.logits.shape[-1] - self.null_experts

    @property
    def expert_weights(self) -> Float[Tensor, "T E"]:
        """Return the weights of the experts that do something."""
        return self.weights[:, : self.num_experts] if self.null_experts else self.weights

    def slots(self) -> tuple[Int[Tensor, "T K"], Float[Tensor, "T K"]]:
        """Return the index form: expert ids and their weights, the largest weight first.

        K is `max_active`; a slot of weight 0 is unused and its expert id means nothing.
        """
        weights_TK, experts_TK = self.expert_weights.topk(self.max_active, dim=-1)
        return experts_TK, weights_TK

    def detach(self) -> "Routing":
        """Return the same routing without its graph."""
        return replace(
            self,
            logits=self.logits.detach(),
            probs=self.probs.detach(),
            weights=self.weights.detach(),
        )

    def rows(self, index: Int[Tensor, " N"], token_mask: Bool[Tensor, " N"] | None) -> "Routing":
        """Return the routing whose token n is routed as token `index[n]` of this one."""
        return replace(
            self,
            logits=self.logits[index],
            probs=self.probs[index],
            weights=self.weights[index],
            token_mask=token_mask,
        )


def _flatten(routing: Routing) -> tuple[list[Tensor | None], tuple[int, int]]:
    tensors = [routing.logits, routing.probs, routing.weights, routing.token_mask]
    return tensors, (routing.max_active, routing.null_experts)


def _unflatten(tensors: Iterable[Any], sizes: Any) -> Routing:
    logits, probs, weights, mask = tensors
    max_active, null_experts = sizes
    return Routing(
        logits=logits,
        probs=probs,
        weights=weights,
        max_active=max_active,
        token_mask=mask,
        null_experts=null_experts,
    )


pytree.register_pytree_node(
    Routing, _flatten, _unflatten, serialized_type_name="moeadapt.routing.Routing"
)


def select_top_k(scores: Float[Tensor, "T E"], k: int) -> Bool[Tensor, "T E"]:
    """Mark the `k` largest scores of each row; equal scores go to the lower index.

    `torch.topk` leaves the order of ties open, so two devices could route one token differently.

    Example:
        >>> select_top_k(torch.tensor([[1.0, 3.0, 3.0, 3.0]]), 2).tolist()
        [[False, True, True, False]]
    """
    num_experts = scores.shape[-1]
    if k >= num_experts:
        return torch.ones_like(scores, dtype=torch.bool)
    few = num_experts <= _PAIRWISE_LIMIT and (k > _FEWEST_PASSES or not scores.is_cpu)
    if few or torch.compiler.is_compiling():
        index = torch.arange(num_experts, device=scores.device)
        mine, other = scores.unsqueeze(-1), scores.unsqueeze(-2)
        beats = (other > mine) | ((other == mine) & (index < index[:, None]))
        return beats.sum(-1) < k
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    for _ in range(k):
        best = scores.masked_fill(chosen, -torch.inf).argmax(-1, keepdim=True)
        chosen = chosen.scatter(-1, best, True)
    return chosen


# Comparing all pairs is few launches, and fuses; beyond this many experts k passes are cheaper, and
# on a CPU, where a launch costs nothing, up to this many passes in any case.
_PAIRWISE_LIMIT = 16
_FEWEST_PASSES = 4
