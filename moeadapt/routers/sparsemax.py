"""Sparsemax routing: the logits projected onto the simplex, with exact zeros at its edges.

Letters: T tokens, D width, E experts.

Source: Martins and Astudillo 2016, https://arxiv.org/abs/1602.02068, eq. 1 and algorithm 1.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from moeadapt.routers.linear import LinearRouter, LinearRouterConfig
from moeadapt.routers.sparsegen import sparsegen
from moeadapt.routing import Routing, TokenContext


class SparsemaxConfig(LinearRouterConfig):
    """Weights are the sparse relative of the softmax; `temperature` sets how sparse."""

    def build(self, dim: int, num_experts: int) -> "SparsemaxRouter":
        """See `RouterConfig.build`."""
        return SparsemaxRouter(self, dim, num_experts, max_active=num_experts, sums_to_one=True)


class SparsemaxRouter(LinearRouter):
    """Sparsegen without a choice of sparsity."""

    adaptive = True

    def forward(self, hidden: Float[Tensor, "T D"], tokens: TokenContext) -> Routing:
        """See `Router.forward`."""
        logits_TE = self.logits(hidden)
        weights_TE = sparsegen(logits_TE, torch.ones_like(logits_TE[:, :1]))
        return self.routing(
            tokens, logits=logits_TE, probs=logits_TE.softmax(-1), weights=weights_TE
        )
