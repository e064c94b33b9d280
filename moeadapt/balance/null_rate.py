"""Holds the share of slots that null experts take, which sets the compute per token.

0 when the share is `target`; (1 - target)^2 when tokens use null experts only, target^2 when they
use none. It does not ask for balance among the other experts: add `switch` for that.

Letters: T tokens, W experts and null experts.

Source: null experts: Zeng et al. 2024 (AdaMoE), https://arxiv.org/abs/2406.13233, section 3. There
the share follows from the balance loss and the numbers of experts; a loss that holds a chosen
share is ours: the squared distance of the counted share, with the gradient of the null experts'
probability (straight-through).
"""

from typing import Annotated

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from moeadapt import stats
from moeadapt.balance.base import BalanceConfig, Mixture
from moeadapt.errors import ConfigError
from moeadapt.routers import Router
from moeadapt.routing import Routing


class NullRateConfig(BalanceConfig):
    """(share of used slots that are null - target)^2.

    Attributes:
        target: share of the slots that null experts should take, in (0, 1).
    """

    target: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5

    def check(self, router: Router) -> None:
        """See `BalanceConfig.check`; there must be null experts."""
        if not router.null_experts:
            raise ConfigError(
                f"balance loss 'null_rate' needs null experts, and this "
                f"{type(router).__name__} has none; use router={{'name': 'top_k', "
                "'null_experts': 2} or drop the loss"
            )

    def loss(self, routing: Routing, mixture: Mixture) -> Float[Tensor, ""]:
        """See `BalanceConfig.loss`."""
        share = stats.load(routing)[routing.num_experts :].sum()
        prob = stats.importance(routing)[routing.num_experts :].sum()
        return (share + (prob - prob.detach()) - self.target).square()
