"""Gumbel-softmax routing: sampled experts with a gradient.

Letters: T tokens, D width, E experts.

Source: Jang et al. 2017, https://arxiv.org/abs/1611.01144, eq. 2, section 2.2 (straight-through).
The noise is added to log-probabilities: adding it to probabilities, as some codes do, samples from
another distribution.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from moeadapt.routers.linear import LinearRouter, LinearRouterConfig
from moeadapt.routing import Routing, TokenContext, select_top_k


class GumbelConfig(LinearRouterConfig):
    """Weights are a Gumbel-softmax sample; `temperature` is that of the sample.

    Attributes:
        straight_through: whether the forward uses the one best expert with weight 1, while the
            gradient is that of the soft sample. Outside training it takes the most probable one.
    """

    straight_through: bool = False

    def build(self, dim: int, num_experts: int) -> "GumbelRouter":
        """See `RouterConfig.build`."""
        # Also straight-through: its gradient needs the outputs of the experts not chosen.
        return GumbelRouter(self, dim, num_experts, max_active=num_experts, sums_to_one=True)


class GumbelRouter(LinearRouter):
    """Softmax of log-probabilities plus Gumbel noise; no noise outside training."""

    config: GumbelConfig

    def forward(self, hidden: Float[Tensor, "T D"], tokens: TokenContext) -> Routing:
        """See `Router.forward`."""
        logits_TE = self.logits(hidden)
        # self.logits divides by the temperature already; the noise is divided alike.
        noisy_TE = logits_TE
        if self.training:
            uniform_TE = torch.rand_like(logits_TE).clamp(min=torch.finfo(logits_TE.dtype).tiny)
            noisy_TE = logits_TE - (-uniform_TE.log()).log() / self.temperature
        weights_TE = noisy_TE.softmax(-1)
        if self.config.straight_through:
            hard_TE = select_top_k(noisy_TE.detach(), 1).to(weights_TE.dtype)
            # 0 exactly where not chosen: the difference of a number and itself.
            weights_TE = hard_TE + (weights_TE - weights_TE.detach())
        return self.routing(
            tokens,
            logits=logits_TE,
            probs=logits_TE.softmax(-1),
            weights=weights_TE,
        )
