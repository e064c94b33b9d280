"""A frozen random router: the baseline that a learned router has to beat.

Letters: T tokens, D width, E experts.

Source: Fan et al. 2024, https://arxiv.org/abs/2402.13089 (frozen random routing as a baseline).
"""

from typing import Annotated, ClassVar, Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from moeadapt.routers.base import check_k
from moeadapt.routers.linear import LinearRouter, LinearRouterConfig, renormalize
from moeadapt.routing import Routing, TokenContext, select_top_k


class RandomConfig(LinearRouterConfig):
    """A random linear gate that is never trained; its tensor is saved with the adapter.

    Attributes:
        k: experts per token, 1 to the number of experts.
        freeze: always true; a random router that trains is `top_k`.
    """

    k_can_change: ClassVar = True

    k: Annotated[int, Field(ge=1)] = 2
    freeze: Literal[True] = True

    def check(self, num_experts: int) -> None:
        """See `RouterConfig.check`."""
        check_k("random", self.k, num_experts)

    def build(self, dim: int, num_experts: int) -> "RandomRouter":
        """See `RouterConfig.build`."""
        self.check(num_experts)
        return RandomRouter(self, dim, num_experts)


class RandomRouter(LinearRouter):
    """Top-k over the logits of a frozen random gate, weights renormalised."""

    config: RandomConfig
    k: int

    def __init__(self, config: RandomConfig, dim: int, num_experts: int) -> None:
        """Make the gate."""
        super().__init__(config, dim, num_experts, max_active=config.k, sums_to_one=True)
        self.k = config.k

    def forward(self, hidden: Float[Tensor, "T D"], tokens: TokenContext) -> Routing:
        """See `Router.forward`."""
        logits_TE = self.logits(hidden)
        probs_TE = logits_TE.softmax(-1)
        weights_TE = probs_TE * select_top_k(logits_TE.detach(), self.k)
        return self.routing(
            tokens,
            logits=logits_TE,
            probs=probs_TE,
            weights=renormalize(weights_TE),
        )
