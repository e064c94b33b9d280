"""Top-p routing: the smallest set of experts whose probabilities reach p.

Letters: T tokens, D width, E experts.

Source: Huang et al. 2024, "Harder Tasks Need More Experts", https://arxiv.org/abs/2403.07652,
eq. 3-5; the weights of the chosen experts are renormalised.
"""

from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from moeadapt.errors import ConfigError
from moeadapt.routers.linear import LinearRouter, LinearRouterConfig, renormalize
from moeadapt.routing import Routing, TokenContext


class TopPConfig(LinearRouterConfig):
    """Each token uses its most probable experts until their probabilities add up to `p`.

    Attributes:
        p: cumulative probability to reach, in (0, 1].
        k_max: at most so many experts per token, >= 1; None: all.
        renorm: whether the chosen probabilities are divided by their sum. A token with a single
            expert then gives it the weight 1, which does not train the router.
    """

    p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    k_max: Annotated[int, Field(ge=1)] | None = None
    renorm: bool = True

    def check(self, num_experts: int) -> None:
        """See `RouterConfig.check`."""
        if self.k_max is not None and self.k_max > num_experts:
            raise ConfigError(
                f"router 'top_p': k_max={self.k_max} is larger than num_experts={num_experts}; "
                f"choose k_max in 1..{num_experts}"
            )

    def build(self, dim: int, num_experts: int) -> "TopPRouter":
        """See `RouterConfig.build`."""
        self.check(num_experts)
        k_max = self.k_max or num_experts
        return TopPRouter(self, dim, num_experts, max_active=k_max, sums_to_one=self.renorm)


class TopPRouter(LinearRouter):
    """Softmax, keep the head of the sorted probabilities, renormalise."""

    adaptive = True
    config: TopPConfig

    def forward(self, hidden: Float[Tensor, "T D"], tokens: TokenContext) -> Routing:
        """See `Router.forward`."""
        logits_TE = self.logits(hidden)
        probs_TE = logits_TE.softmax(-1)
        with torch.no_grad():
            # Stable, so equal probabilities go to the lower index.
            sorted_TE, order_TE = probs_TE.sort(dim=-1, descending=True, stable=True)
            before_TE = sorted_TE.cumsum(-1) - sorted_TE
            keep_TE = before_TE < self.config.p
            keep_TE[:, 0] = True  # rounding must not leave a token without an expert
            keep_TE[:, self.max_active :] = False
            chosen_TE = torch.zeros_like(keep_TE).scatter(-1, order_TE, keep_TE)
        weights_TE = probs_TE * chosen_TE
        if self.config.renorm:
            weights_TE = renormalize(weights_TE)
        return self.routing(tokens, logits=logits_TE, probs=probs_TE, weights=weights_TE)
