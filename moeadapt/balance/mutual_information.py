"""Mutual information of tokens and experts, maximised: the loss is minus it.

-log E at perfect balance (every token sure of one expert, experts used equally); 0 at a collapse
onto one expert, and 0 when every token is equally undecided.

Source: Chen et al. 2023 (Mod-Squad), https://arxiv.org/abs/2212.08066, with tokens in place
of tasks: I = H(mean p) - mean H(p). The same number as `entropy` with both coefficients 1.
"""

from jaxtyping import Float
from torch import Tensor

from moeadapt import stats
from moeadapt.balance.base import BalanceConfig, Mixture
from moeadapt.balance.entropy import entropy, mean_entropy
from moeadapt.routing import Routing


class MutualInformationConfig(BalanceConfig):
    """Mean token entropy minus the entropy of the mean, in nats."""

    def loss(self, routing: Routing, mixture: Mixture) -> Float[Tensor, ""]:
        """See `BalanceConfig.loss`."""
        return mean_entropy(routing) - entropy(stats.importance(routing))
