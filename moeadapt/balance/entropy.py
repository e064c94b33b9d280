"""Entropy of each token's probabilities, to lower, and of their mean, to raise.

With both coefficients 1: -log E at perfect balance (every token sure of one expert, experts used
equally); 0 at a collapse onto one expert, and 0 when every token is undecided.

Letters: T tokens, W experts and null experts (which count like the others).

Source: Mustafa et al. 2022 (LIMoE), https://arxiv.org/abs/2206.02770: local and global
entropy losses, the global one with a threshold. One modality here.
"""

import math
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from moeadapt import stats
from moeadapt.balance.base import BalanceConfig, Mixture
from moeadapt.routing import Routing


class EntropyConfig(BalanceConfig):
    """local * mean token entropy - global_ * entropy of the mean.

    Attributes:
        local: what the mean token entropy (nats) is multiplied by, >= 0.
        global_: what minus the entropy of the mean probabilities (nats) is multiplied by, >= 0.
        min_experts: experts, >= 1: the global term is max(0, log(min_experts) - entropy), which
            stops raising the entropy where that many experts are in equal use; None: never stops.
    """

    local: Annotated[float, Field(ge=0.0)] = 1.0
    global_: Annotated[float, Field(ge=0.0)] = 1.0
    min_experts: Annotated[float, Field(ge=1.0)] | None = None

    def loss(self, routing: Routing, mixture: Mixture) -> Float[Tensor, ""]:
        """See `BalanceConfig.loss`."""
        spread = -entropy(stats.importance(routing))
        if self.min_experts is not None:
            spread = torch.relu(math.log(self.min_experts) + spread)
        return self.local * mean_entropy(routing) + self.global_ * spread


def mean_entropy(routing: Routing) -> Float[Tensor, ""]:
    """Mean entropy of a token's probabilities, in nats."""
    return stats.token_mean(entropy(routing.probs), routing)


def entropy(probs: Float[Tensor, "*T W"]) -> Float[Tensor, "*T"]:
    """Entropy in nats; its gradient stays finite where a probability is 0."""
    return -(probs * probs.clamp(min=torch.finfo(probs.dtype).tiny).log()).sum(-1)
