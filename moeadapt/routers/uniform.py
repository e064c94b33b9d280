"""Every expert for every token, equally: the baseline without a router.

Letters: T tokens, D width, E experts.

Source: the constant-gate baseline; a mixture with it is one dense LoRA of rank E*r.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from moeadapt.routers.base import Router, RouterConfig
from moeadapt.routing import Routing, TokenContext


class UniformConfig(RouterConfig):
    """Weight 1/E for every expert; no parameters, no settings."""

    def build(self, dim: int, num_experts: int) -> "UniformRouter":
        """See `RouterConfig.build`."""
        return UniformRouter(num_experts)


class UniformRouter(Router):
    """The same weights for every token."""

    def __init__(self, num_experts: int) -> None:
        """Remember E."""
        super().__init__(num_experts, max_active=num_experts, sums_to_one=True)

    def forward(self, hidden: Float[Tensor, "T D"], tokens: TokenContext) -> Routing:
        """See `Router.forward`."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        shape = (hidden.shape[0], self.num_experts)
        weights_TE = torch.full(shape, 1 / self.num_experts, dtype=dtype, device=hidden.device)
        return Routing(
            logits=torch.zeros_like(weights_TE),
            probs=weights_TE,
            weights=weights_TE,
            max_active=self.num_experts,
            token_mask=tokens.mask,
        )
