"""Rank-wise routing: every rank of the experts is an expert of its own.

Letters: T tokens, D width, E experts (single ranks).

Source: Zhao et al. 2025 (SMoRA), https://arxiv.org/abs/2501.15103, eq. 7-9: softmax over the ranks,
the k largest of probability plus a load-balancing bias (balance loss `loss_free`), weighted by
their probabilities.
"""

from typing import Annotated, ClassVar

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from moeadapt.routers.base import check_k
from moeadapt.routers.linear import LinearRouter, LinearRouterConfig, renormalize
from moeadapt.routing import Routing, TokenContext, select_top_k


class RankWiseConfig(LinearRouterConfig):
    """Each token uses its `k` most probable ranks; for experts `rank1`.

    Attributes:
        k: ranks per token, 1 to the number of ranks (`num_experts * r` with experts `rank1`).
        renorm: whether the chosen probabilities are divided by their sum.
    """

    k_can_change: ClassVar = True

    k: Annotated[int, Field(ge=1)] = 8
    renorm: bool = True

    def check(self, num_experts: int) -> None:
        """See `RouterConfig.check`."""
        check_k("rank_wise", self.k, num_experts)

    def build(self, dim: int, num_experts: int) -> "RankWiseRouter":
        """See `RouterConfig.build`."""
        self.check(num_experts)
        return RankWiseRouter(self, dim, num_experts)


class RankWiseRouter(LinearRouter):
    """Softmax over ranks, biased choice, unbiased weights."""

    config: RankWiseConfig
    k: int
    ranks_with_bias = True

    def __init__(self, config: RankWiseConfig, dim: int, num_experts: int) -> None:
        """Make the gate."""
        super().__init__(config, dim, num_experts, max_active=config.k, sums_to_one=config.renorm)
        self.k = config.k

    def forward(self, hidden: Float[Tensor, "T D"], tokens: TokenContext) -> Routing:
        """See `Router.forward`."""
        logits_TE = self.logits(hidden)
        probs_TE = logits_TE.softmax(-1)
        weights_TE = probs_TE * select_top_k(self.ranked(probs_TE), self.k)
        if self.config.renorm:
            weights_TE = renormalize(weights_TE)
        return self.routing(tokens, logits=logits_TE, probs=probs_TE, weights=weights_TE)
