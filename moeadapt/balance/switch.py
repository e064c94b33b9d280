"""Switch load balancing: 1 at perfect balance, E when every token picks the same expert.

Source: Fedus et al. 2021, https://arxiv.org/abs/2101.03961, eq. 4-6. The token share is divided by
the slots in use, so perfect balance gives 1 for every k; the function of the same purpose in
transformers gives k times this, and pools all layers, which calls two collapsed layers balanced.
Where every token uses every expert, or every expert is used equally often by construction
(`expert_choice`), it is constant 1 and trains nothing.
"""

from jaxtyping import Float
from torch import Tensor

from moeadapt import stats
from moeadapt.balance.base import BalanceConfig, Mixture
from moeadapt.routing import Routing


class SwitchConfig(BalanceConfig):
    """E * sum over experts of load * importance."""

    def loss(self, routing: Routing, mixture: Mixture) -> Float[Tensor, ""]:
        """See `BalanceConfig.loss`."""
        return routing.logits.shape[-1] * (stats.load(routing) * stats.importance(routing)).sum()
