"""Variance over experts of their mean probability.

0 at perfect balance; (E - 1) / E^2 when every token gives one expert all the probability.

Source: the plain form of the importance loss of Shazeer et al. 2017,
https://arxiv.org/abs/1701.06538, eq. 7: of probabilities instead of weights, and without dividing
by the squared mean, which is 1 / E^2. Null experts are alike, so each counts as their average.
"""

from jaxtyping import Float
from torch import Tensor

from moeadapt import stats
from moeadapt.balance.base import BalanceConfig, Mixture, null_average
from moeadapt.routing import Routing


class VarianceConfig(BalanceConfig):
    """Population variance of the importance."""

    def loss(self, routing: Routing, mixture: Mixture) -> Float[Tensor, ""]:
        """See `BalanceConfig.loss`."""
        importance_W = null_average(stats.importance(routing), routing.null_experts)
        return importance_W.var(correction=0)
