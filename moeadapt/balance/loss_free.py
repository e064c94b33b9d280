"""Balance without a loss: a bias per expert, added to the scores for the choice alone.

    bias_e += rate * sign(mean uses - uses_e)     after each optimizer step

The loss itself is 0 at balance, at collapse and everywhere; at perfect balance the bias rests.

Letters: W experts and null experts.

Source: Wang et al. 2024, https://arxiv.org/abs/2408.15664, algorithm 1; DeepSeek-V3,
https://arxiv.org/abs/2412.19437, section 2.1.2. Weights come from the scores without bias. Null
experts are alike, so each counts as their average.
"""

from typing import Annotated, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from moeadapt.balance.base import BalanceConfig, Mixture, null_average, routers_where
from moeadapt.errors import ConfigError
from moeadapt.routers import Router
from moeadapt.routing import Routing


class LossFreeConfig(BalanceConfig):
    """Moves the router's selection bias towards equal use.

    Attributes:
        coef: without effect: it multiplies a loss that is 0.
        rate: how far a bias moves per optimizer step, in units of a score, >= 0; what a number
            alone means, as in `{"loss_free": 0.001}`.
    """

    shorthand: ClassVar = "rate"

    rate: Annotated[float, Field(ge=0.0)] = 0.001

    @property
    def acts_after_step(self) -> bool:
        """See `BalanceConfig.acts_after_step`."""
        return True

    def check(self, router: Router) -> None:
        """See `BalanceConfig.check`; a selection bias must change what the router chooses."""
        if not _works(router):
            raise ConfigError(
                f"balance loss 'loss_free' moves a selection bias, which does not change what a "
                f"{type(router).__name__} chooses; use one of {routers_where(_works)}"
            )

    def prepare(self, router: Router) -> None:
        """See `BalanceConfig.prepare`."""
        router.add_selection_bias()

    def loss(self, routing: Routing, mixture: Mixture) -> Float[Tensor, ""]:
        """See `BalanceConfig.loss`; always 0, without a gradient."""
        return routing.logits.new_zeros(())

    @torch.no_grad()
    def after_step(
        self, router: Router, tokens: Float[Tensor, ""], uses: Float[Tensor, " W"]
    ) -> None:
        """See `BalanceConfig.after_step`; without tokens nothing is used, so nothing moves."""
        assert router.selection_bias is not None
        uses_W = null_average(uses, router.null_experts)
        step_W = (uses_W.mean() - uses_W).sign()
        router.selection_bias.add_(self.rate * step_W.to(router.selection_bias))


def _works(router: Router) -> bool:
    return router.ranks_with_bias
