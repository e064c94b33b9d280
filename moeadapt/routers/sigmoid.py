"""Sigmoid routing: independent scores per expert, the k largest are used.

Letters: T tokens, D width, E experts.

Source: DeepSeek-AI 2024 (DeepSeek-V3), https://arxiv.org/abs/2412.19437, eq. 12-16. The selection
bias, which changes which experts are chosen but never their weights, comes with the balance loss
`loss_free`.
"""

from typing import Annotated, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from moeadapt.routers.base import check_k
from moeadapt.routers.linear import LinearRouter, LinearRouterConfig
from moeadapt.routing import Routing, TokenContext, select_top_k


class SigmoidConfig(LinearRouterConfig):
    """Each token uses the `k` experts with the largest sigmoid scores.

    Attributes:
        k: experts per token, 1 to the number of experts.
        renorm: whether the chosen scores are divided by their sum.
        scale: what the weights are multiplied by, > 0 (routed_scaling_factor of DeepSeek-V3).
    """

    k_can_change: ClassVar = True

    k: Annotated[int, Field(ge=1)] = 2
    renorm: bool = True
    scale: Annotated[float, Field(gt=0.0)] = 1.0

    def check(self, num_experts: int) -> None:
        """See `RouterConfig.check`."""
        check_k("sigmoid", self.k, num_experts)

    def build(self, dim: int, num_experts: int) -> "SigmoidRouter":
        """See `RouterConfig.build`."""
        self.check(num_experts)
        return SigmoidRouter(self, dim, num_experts)


class SigmoidRouter(LinearRouter):
    """Sigmoid, biased selection, unbiased weights."""

    config: SigmoidConfig
    k: int
    ranks_with_bias = True

    def __init__(self, config: SigmoidConfig, dim: int, num_experts: int) -> None:
        """Make the gate."""
        exact = config.renorm and config.scale == 1.0
        super().__init__(config, dim, num_experts, max_active=config.k, sums_to_one=exact)
        self.k = config.k

    def forward(self, hidden: Float[Tensor, "T D"], tokens: TokenContext) -> Routing:
        """See `Router.forward`."""
        logits_TE = self.logits(hidden)
        scores_TE = logits_TE.sigmoid()
        chosen_TE = select_top_k(self.ranked(scores_TE), self.k)
        # A softmax of log-sigmoids divides by the sum even where every sigmoid is 0.
        logs_TE = F.logsigmoid(logits_TE)
        if self.config.renorm:
            weights_TE = logs_TE.masked_fill(~chosen_TE, -torch.inf).softmax(-1)
        else:
            weights_TE = scores_TE * chosen_TE
        return self.routing(
            tokens,
            logits=logits_TE,
            probs=logs_TE.softmax(-1),
            weights=weights_TE if self.config.scale == 1.0 else weights_TE * self.config.scale,
        )
