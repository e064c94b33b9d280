"""Sparsegen routing: a sparse projection onto the simplex whose sparsity each token predicts.

    w = argmin_p |p - l|^2 - lambda |p|^2  over the simplex,  lambda < 1
      = max(0, l - tau) / (1 - lambda)     with tau such that the weights sum to one

So the number of experts is differentiable in lambda, and at least one expert is always used.

Letters: T tokens, D width, E experts.

Source: Zhuang et al. 2025 (LD-MoLE), https://arxiv.org/abs/2509.25684, proposition 1; Laha et al.
2018, https://arxiv.org/abs/1810.11975, eq. 8. We predict 1 - lambda = softplus(u.x + b) by one
linear map per router instead of an MLP shared by the model, so that routers stay independent.
"""

import math
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from moeadapt.routers.linear import LinearRouter, LinearRouterConfig
from moeadapt.routing import Routing, TokenContext


class SparsegenConfig(LinearRouterConfig):
    """Each token chooses how sparse its weights are.

    Attributes:
        spread: initial value of 1 - lambda, over 0.001 to 100: larger uses more experts; 1 is
            sparsemax.
    """

    spread: Annotated[float, Field(gt=0.001, le=100.0)] = 1.0

    def build(self, dim: int, num_experts: int) -> "SparsegenRouter":
        """See `RouterConfig.build`."""
        return SparsegenRouter(self, dim, num_experts)


class SparsegenRouter(LinearRouter):
    """Sparsegen with a predicted lambda per token."""

    adaptive = True
    config: SparsegenConfig

    def __init__(self, config: SparsegenConfig, dim: int, num_experts: int) -> None:
        """Make the gate and the map that predicts the spread."""
        super().__init__(config, dim, num_experts, max_active=num_experts, sums_to_one=True)
        self.spread_weight = nn.Parameter(torch.zeros(1, dim))
        # softplus(b) = spread
        self.spread_bias = nn.Parameter(
            torch.full((1,), math.log(math.expm1(config.spread - _LEAST)))
        )

    def forward(self, hidden: Float[Tensor, "T D"], tokens: TokenContext) -> Routing:
        """See `Router.forward`."""
        logits_TE = self.logits(hidden)
        spread_T1 = _LEAST + F.softplus(self.linear(hidden, self.spread_weight, self.spread_bias))
        return self.routing(
            tokens,
            logits=logits_TE,
            probs=logits_TE.softmax(-1),
            weights=sparsegen(logits_TE, spread_T1),
        )


def sparsegen(logits: Float[Tensor, "T E"], spread: Float[Tensor, "T 1"]) -> Float[Tensor, "T E"]:
    """Project onto the simplex; `spread` = 1 - lambda > 0.

    The support is found by sorting; given the support, the weights are linear in the logits and
    smooth in the spread, and that is what is differentiated.
    """
    logits = logits - logits.amax(-1, keepdim=True).detach()
    with torch.no_grad():
        sorted_TE = logits.sort(-1, descending=True).values
        count_E = torch.arange(1, logits.shape[-1] + 1, device=logits.device, dtype=logits.dtype)
        inside_TE = spread + count_E * sorted_TE > sorted_TE.cumsum(-1)
        size_T1 = inside_TE.sum(-1, keepdim=True).clamp(min=1)  # none inside where logits are NaN
        least_T1 = sorted_TE.gather(-1, size_T1 - 1)
        support_TE = (logits >= least_T1).to(logits.dtype)
        size_T1 = support_TE.sum(-1, keepdim=True).clamp(min=1)
    tau_T1 = ((logits * support_TE).sum(-1, keepdim=True) - spread) / size_T1
    return F.relu(logits - tau_T1) * support_TE / spread


# Sums of logits are compared with the spread, so it must not vanish beside their rounding.
_LEAST = 0.001
