"""Soft routing: every expert, weighted by its probability.

Letters: T tokens, D width, E experts.

Source: Jacobs et al. 1991, "Adaptive Mixtures of Local Experts", eq. 1.3; with LoRA experts:
HydraLoRA, https://arxiv.org/abs/2404.19245, eq. 6; SMoLA, https://arxiv.org/abs/2312.00968.
"""

from jaxtyping import Float
from torch import Tensor

from moeadapt.routers.linear import LinearRouter, LinearRouterConfig
from moeadapt.routing import Routing, TokenContext


class SoftConfig(LinearRouterConfig):
    """Weights are the softmax over all experts."""

    def build(self, dim: int, num_experts: int) -> "SoftRouter":
        """See `RouterConfig.build`."""
        return SoftRouter(self, dim, num_experts, max_active=num_experts, sums_to_one=True)


class SoftRouter(LinearRouter):
    """A dense softmax."""

    def forward(self, hidden: Float[Tensor, "T D"], tokens: TokenContext) -> Routing:
        """See `Router.forward`."""
        logits_TE = self.logits(hidden)
        probs_TE = logits_TE.softmax(-1)
        return self.routing(
            tokens,
            logits=logits_TE,
            probs=probs_TE,
            weights=probs_TE,
        )
