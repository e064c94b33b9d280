"""Squared coefficient of variation of the experts' importance, and of their load.

0 when every expert has the same total weight; E - 1 at a collapse onto one expert, E/k - 1 onto k
equal ones (each of the two terms).

Letters: T tokens, E experts.

Source: Shazeer et al. 2017, https://arxiv.org/abs/1701.06538, eq. 6-7 (importance) and eq. 10-11
(load). The paper makes the load differentiable through the noise of its router, which a routing
does not carry: here the load is counted, and its gradient is that of the mean probability
(straight-through), so the term works with every router. Null experts have no weight in the mixture
and are left out.
"""

from typing import Annotated

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from moeadapt import stats
from moeadapt.balance.base import BalanceConfig, Mixture
from moeadapt.routing import Routing


class ImportanceCv2Config(BalanceConfig):
    """CV(sum over tokens of the weights)^2 + load * CV(tokens per expert)^2.

    Attributes:
        load: what the second term is multiplied by, >= 0; Shazeer et al. use 1.
    """

    load: Annotated[float, Field(ge=0.0)] = 0.0

    def loss(self, routing: Routing, mixture: Mixture) -> Float[Tensor, ""]:
        """See `BalanceConfig.loss`."""
        value = _cv2(stats.token_mean(routing.expert_weights, routing))
        if self.load:
            used_TE = (routing.expert_weights.detach() != 0).to(routing.probs.dtype)
            probs_TE = routing.probs[:, : routing.num_experts]
            through_TE = used_TE + (probs_TE - probs_TE.detach())
            value = value + self.load * _cv2(stats.token_mean(through_TE, routing))
        return value


def _cv2(amounts: Float[Tensor, " E"]) -> Float[Tensor, ""]:
    """Variance over squared mean; 0 when there is nothing."""
    total = amounts.sum()
    share_E = amounts / total.where(total != 0, 1.0)
    return len(amounts) ** 2 * share_E.var(correction=0)
