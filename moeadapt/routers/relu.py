"""ReLU routing: an expert is used where its logit is positive; fully differentiable.

Letters: T tokens, D width, E experts.

Source: Wang et al. 2024 (ReMoE), https://arxiv.org/abs/2412.14711, eq. 5. The number of experts in
use is held by the balance loss `l1_sparsity` with a `target`. A token may use no expert at all: its
output is then the base model's.
"""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from moeadapt.routers.linear import LinearRouter, LinearRouterConfig
from moeadapt.routing import Routing, TokenContext


class ReluConfig(LinearRouterConfig):
    """Weights are relu(logits)."""

    def build(self, dim: int, num_experts: int) -> "ReluRouter":
        """See `RouterConfig.build`."""
        return ReluRouter(self, dim, num_experts, max_active=num_experts, sums_to_one=False)


class ReluRouter(LinearRouter):
    """relu of the gate."""

    adaptive = True

    def forward(self, hidden: Float[Tensor, "T D"], tokens: TokenContext) -> Routing:
        """See `Router.forward`."""
        logits_TE = self.logits(hidden)
        return self.routing(
            tokens,
            logits=logits_TE,
            probs=logits_TE.softmax(-1),
            weights=F.relu(logits_TE),
        )
