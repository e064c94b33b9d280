"""Threshold routing: every expert whose probability passes a threshold, fixed or learned.

Letters: T tokens, D width, E experts.

Source: fixed: XMoE, Yang et al. 2024, https://arxiv.org/abs/2403.18926, section 3.2 (as a
per-expert probability threshold); learned: AdaMoLE, Liu and Luo 2024,
https://arxiv.org/abs/2405.00361, eq. 5-7: tau(x) = tau_max * sigmoid(w.x + b), and weights
max(0, p - tau) renormalised, through which the threshold gets its gradient.
"""

from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from moeadapt.routers.linear import LinearRouter, LinearRouterConfig, renormalize
from moeadapt.routing import Routing, TokenContext, select_top_k


class ThresholdConfig(LinearRouterConfig):
    """Each token uses the experts with probability above a threshold, its best one at least.

    Attributes:
        tau: the threshold; with `learned`, its maximum. In (0, 1); None: 1 / number of experts.
        learned: whether the threshold is predicted per token (AdaMoLE).
        renorm: whether the weights are divided by their sum. A token with a single expert then
            gives it the weight 1, which does not train the router.
    """

    tau: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    learned: bool = False
    renorm: bool = True

    def build(self, dim: int, num_experts: int) -> "ThresholdRouter":
        """See `RouterConfig.build`."""
        return ThresholdRouter(self, dim, num_experts)


class ThresholdRouter(LinearRouter):
    """Softmax, drop what is under the threshold, renormalise."""

    adaptive = True
    config: ThresholdConfig

    def __init__(self, config: ThresholdConfig, dim: int, num_experts: int) -> None:
        """Make the gate, and the threshold's own if it is learned."""
        super().__init__(
            config, dim, num_experts, max_active=num_experts, sums_to_one=config.renorm
        )
        self.tau = config.tau or 1 / num_experts
        self.tau_weight = nn.Parameter(torch.zeros(1, dim)) if config.learned else None
        self.tau_bias = nn.Parameter(torch.zeros(1)) if config.learned else None

    def forward(self, hidden: Float[Tensor, "T D"], tokens: TokenContext) -> Routing:
        """See `Router.forward`."""
        logits_TE = self.logits(hidden)
        probs_TE = logits_TE.softmax(-1)
        best_TE = select_top_k(probs_TE.detach(), 1)
        if self.config.learned:
            above_TE = F.relu(probs_TE - self._threshold(hidden))
            # A token that no expert passes falls back to its best one.
            none_T1 = (above_TE.detach() == 0).all(-1, keepdim=True)
            kept_TE = torch.where(none_T1, probs_TE * best_TE, above_TE)
        else:
            kept_TE = probs_TE * ((probs_TE.detach() >= self.tau) | best_TE)
        weights_TE = renormalize(kept_TE) if self.config.renorm else kept_TE
        return self.routing(tokens, logits=logits_TE, probs=probs_TE, weights=weights_TE)

    def _threshold(self, hidden: Float[Tensor, "T D"]) -> Float[Tensor, "T 1"]:
        assert self.tau_weight is not None
        assert self.tau_bias is not None
        return self.tau * self.linear(hidden, self.tau_weight, self.tau_bias).sigmoid()
