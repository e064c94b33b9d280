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
from moeadapt.routers.linear import LinearRouter, LinearRouterConfig
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
    """p(expert) = p(group) * p(expert | group); top-k on both levels.

    Each level is renormalised over what was chosen, except where that is a single one: its weight
    would be 1 and never train the gate.
    """

    config: HierarchicalConfig

    def __init__(self, config: HierarchicalConfig, dim: int, num_experts: int) -> None:
        """Make the gate of the experts and the gate of the groups."""
        super().__init__(
            config,
            dim,
            num_experts,
            max_active=config.k_groups * config.k,
            sums_to_one=config.k_groups > 1 and config.k > 1,
        )
        self.group_weight = nn.Parameter(torch.empty(config.groups, dim))
        nn.init.normal_(self.group_weight, std=config.init_std)

    def forward(self, hidden: Float[Tensor, "T D"], tokens: TokenContext) -> Routing:
        """See `Router.forward`."""
        config = self.config
        expert_TGM = self.logits(hidden).unflatten(-1, (config.groups, -1))
        group_TG = self.linear(hidden, self.group_weight) / self.temperature
        log_TGM = expert_TGM.log_softmax(-1) + group_TG.log_softmax(-1).unsqueeze(-1)
        groups_TG = self._choose(group_TG, config.k_groups)
        inside_TGM = self._choose(expert_TGM.flatten(0, 1), config.k).view_as(expert_TGM)
        weights_TGM = groups_TG.unsqueeze(-1) * inside_TGM
        return self.routing(
            tokens,
            logits=(expert_TGM + group_TG.unsqueeze(-1)).flatten(1),
            probs=log_TGM.exp().flatten(1),
            weights=weights_TGM.flatten(1),
        )

    def _choose(self, logits: Float[Tensor, "N C"], k: int) -> Float[Tensor, "N C"]:
        """Return the weights of one level."""
        chosen = select_top_k(logits.detach(), k)
        if k > 1:
            return logits.masked_fill(~chosen, -torch.inf).softmax(-1)
        return logits.softmax(-1) * chosen
