"""Cosine routing: angles between a projected hidden state and learned expert embeddings.

Letters: T tokens, D width, P projected width, E experts.

Source: Chi et al. 2022 (X-MoE), https://arxiv.org/abs/2204.09179, eq. 5-6: low-dimensional
projection, L2 normalisation, learned temperature.
"""

from typing import Annotated, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from moeadapt.routers.base import check_k
from moeadapt.routers.linear import LinearRouter, LinearRouterConfig, renormalize
from moeadapt.routing import Routing, TokenContext, select_top_k


class CosineConfig(LinearRouterConfig):
    """Each token uses the `k` experts whose embeddings point most its way.

    Attributes:
        k: experts per token, 1 to the number of experts.
        dim: width of the projection, 1 to 65536; X-MoE takes half the number of experts.
        min_temperature: lower bound of the learned temperature, > 0.
    """

    k_can_change: ClassVar = True

    k: Annotated[int, Field(ge=1)] = 2
    dim: Annotated[int, Field(ge=1, le=65536)] = 16
    min_temperature: Annotated[float, Field(gt=0.0)] = 0.01

    def check(self, num_experts: int) -> None:
        """See `RouterConfig.check`."""
        check_k("cosine", self.k, num_experts)

    def build(self, dim: int, num_experts: int) -> "CosineRouter":
        """See `RouterConfig.build`."""
        self.check(num_experts)
        return CosineRouter(self, dim, num_experts)


class CosineRouter(LinearRouter):
    """Top-k of temperature-scaled cosines, renormalised."""

    config: CosineConfig
    k: int
    ranks_with_bias = True
    gate_per_expert = False

    def __init__(self, config: CosineConfig, dim: int, num_experts: int) -> None:
        """Make the projection (the gate's weight) and the expert embeddings."""
        super().__init__(
            config, dim, num_experts, max_active=config.k, sums_to_one=True, rows=config.dim
        )
        self.k = config.k
        self.embeddings = nn.Parameter(torch.empty(num_experts, config.dim))
        nn.init.orthogonal_(self.embeddings)
        self.log_temperature = nn.Parameter(torch.full((1,), 0.07).log())

    def logits(self, hidden: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        """Cosines over the temperature: at most 1 / min_temperature in size."""
        projected_TP = F.normalize(self.linear(hidden, self.weight, self.bias), dim=-1)
        embeddings_EP = F.normalize(self.embeddings.to(projected_TP.dtype), dim=-1)
        with torch.autocast(hidden.device.type, enabled=False):
            cosine_TE = F.linear(projected_TP, embeddings_EP)
        learned = self.log_temperature.exp().clamp(min=self.config.min_temperature)
        return self.finish(cosine_TE / learned.to(cosine_TE.dtype))

    def forward(self, hidden: Float[Tensor, "T D"], tokens: TokenContext) -> Routing:
        """See `Router.forward`."""
        logits_TE = self.logits(hidden)
        probs_TE = logits_TE.softmax(-1)
        weights_TE = probs_TE * select_top_k(self.ranked(probs_TE), self.k)
        return self.routing(
            tokens,
            logits=logits_TE,
            probs=probs_TE,
            weights=renormalize(weights_TE),
        )
