"""Hierarchical routing: a gate over groups of experts, then a gate inside each chosen group.

Letters: T tokens, D width, E experts, G groups, M experts of a group.

Source: Jordan and Jacobs 1994, "Hierarchical Mixtures of Experts and the EM Algorithm", eq. 1-3;
as a sparse layer: Shazeer et al. 2017, https://arxiv.org/abs/1701.06538, appendix B.
"""

from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from moeadapt.errors import ConfigError
from moeadapt.routers.base import LinearRouter, LinearRouterConfig, renormalize
from moeadapt.routing import Routing, TokenContext, select_top_k


class HierarchicalConfig(LinearRouterConfig):
    """Each token uses `k` experts in each of its `k_groups` groups.

    Attributes:
        groups: number of groups, a divisor of the number of experts, >= 2.
        k_groups: groups per token, 1 to `groups`.
        k: experts per chosen group, 1 to the size of a group.
    """

    groups: Annotated[int, Field(ge=2)] = 2
    k_groups: Annotated[int, Field(ge=1)] = 1
    k: Annotated[int, Field(ge=1)] = 1

    def check(self, num_experts: int) -> None:
        """See `RouterConfig.check`."""
        if num_experts % self.groups:
            raise ConfigError(
                f"router 'hierarchical': groups={self.groups} does not divide "
                f"num_experts={num_experts}"
            )
        size = num_experts // self.groups
        for name, value, limit in (("k_groups", self.k_groups, self.groups), ("k", self.k, size)):
            if value > limit:
                raise ConfigError(
                    f"router 'hierarchical': {name}={value} is larger than {limit} "
                    f"({self.groups} groups of {size} experts)"
                )

    def build(self, dim: int, num_experts: int) -> "HierarchicalRouter":
        """See `RouterConfig.build`."""
        self.check(num_experts)
        return HierarchicalRouter(self, dim, num_experts)


class HierarchicalRouter(LinearRouter):
    """p(expert) = p(group) * p(expert | group); top-k on both levels."""

    config: HierarchicalConfig

    def __init__(self, config: HierarchicalConfig, dim: int, num_experts: int) -> None:
        """Make the gate of the experts and the gate of the groups."""
        # A single choice that were renormalised would have weight 1 and never train the gates.
        self.renorm = config.k_groups * config.k > 1
        super().__init__(
            config,
            dim,
            num_experts,
            max_active=config.k_groups * config.k,
            sums_to_one=self.renorm,
        )
        self.group_weight = nn.Parameter(torch.empty(config.groups, dim))
        nn.init.normal_(self.group_weight, std=config.init_std)

    def forward(self, hidden: Float[Tensor, "T D"], tokens: TokenContext) -> Routing:
        """See `Router.forward`."""
        config = self.config
        expert_TGM = self.logits(hidden).unflatten(-1, (config.groups, -1))
        group_TG = self.linear(hidden, self.group_weight) / self.temperature
        log_TGM = expert_TGM.log_softmax(-1) + group_TG.log_softmax(-1).unsqueeze(-1)
        groups_TG = select_top_k(group_TG.detach(), config.k_groups)
        inside = select_top_k(expert_TGM.detach().flatten(0, 1), config.k)
        chosen_TGM = inside.view_as(expert_TGM) & groups_TG.unsqueeze(-1)
        logits_TE, probs_TE = log_TGM.flatten(1), log_TGM.exp().flatten(1)
        weights_TE = probs_TE * chosen_TGM.flatten(1)
        return self.routing(
            tokens,
            logits=logits_TE,
            probs=probs_TE,
            weights=renormalize(weights_TE) if self.renorm else weights_TE,
        )
