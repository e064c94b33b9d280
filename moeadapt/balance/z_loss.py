"""Router z-loss: keeps logits small, so that the softmax stays precise.

It has no balance value: it is (log E)^2 when all logits are 0 and grows with their size; at a
collapse onto one expert with logit l it is about l^2.

Source: Zoph et al. 2022 (ST-MoE), https://arxiv.org/abs/2202.08906, eq. 5.
"""

from jaxtyping import Float
from torch import Tensor

from moeadapt import stats
from moeadapt.balance.base import BalanceConfig, Mixture
from moeadapt.routing import Routing


class ZLossConfig(BalanceConfig):
    """Mean over tokens of logsumexp(logits)^2."""

    def loss(self, routing: Routing, mixture: Mixture) -> Float[Tensor, ""]:
        """See `BalanceConfig.loss`."""
        return stats.token_mean(routing.logits.logsumexp(-1).square(), routing)
