"""L1 sparsity: fewer experts per token, with a coefficient that can hold a target.

Router `relu`: the mean L1 norm of a token's weights; S when each token's weights sum to S, balanced
or collapsed. With `balanced` S at perfect balance, and at a collapse onto one expert E * S, or
S / target with a target. Other routers: the mean L1 norm of the probabilities divided by their L2
norm (the L1 norm of probabilities alone is constant): 1 when every token is sure of one expert,
balanced or collapsed, sqrt(E) when it is undecided; with `balanced` E instead of 1 at a collapse.

Letters: T tokens, E experts, W experts and null experts.

Source: other routers: You et al. 2021 (SpeechMoE), https://arxiv.org/abs/2105.03036, sparsity L1
loss. `relu`: Wang et al. 2024 (ReMoE), https://arxiv.org/abs/2412.14711, adaptive L1
regularisation: L1 of the weights, coefficient *= alpha^sign(sparsity wanted - sparsity), and the
load-balanced form. ReMoE holds the mean sparsity of all layers with one coefficient; here each
router holds its own.
"""

from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from moeadapt import stats
from moeadapt.balance.base import BalanceConfig, Mixture, routers_where
from moeadapt.errors import ConfigError
from moeadapt.routers import Router
from moeadapt.routers.relu import ReluRouter
from moeadapt.routing import Routing


class L1SparsityConfig(BalanceConfig):
    """Mean over tokens of the L1 norm of weights or of unit-norm probabilities.

    Attributes:
        coef: the coefficient, >= 0; with a `target` the one to start from, > 0 (ReMoE: 1e-8). From
            then on it is the buffer `sparsity_coef` of the router, saved with the adapter.
        target: share of the experts that tokens use on average, in (0, 1); None: `coef` is fixed.
        alpha: factor by which the coefficient changes per optimizer step, > 1.
        balanced: multiply each expert's part by its use over that of perfect balance at `target`,
            or over the mean use without one (the form ReMoE trains with).
    """

    target: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    alpha: Annotated[float, Field(gt=1.0)] = 1.2
    balanced: bool = False

    @property
    def acts_after_step(self) -> bool:
        """See `BalanceConfig.acts_after_step`; only with a target."""
        return self.target is not None

    def check(self, router: Router) -> None:
        """See `BalanceConfig.check`; a target needs a varying number of experts per token."""
        if self.target is None:
            return
        if not router.adaptive:
            raise ConfigError(
                f"balance loss 'l1_sparsity': target={self.target} needs a router whose number of "
                f"experts per token the loss can change, which a {type(router).__name__} is not; "
                f"use one of {routers_where(_is_adaptive)}, or leave target out"
            )
        if self.coef == 0:
            raise ConfigError(
                f"balance loss 'l1_sparsity': target={self.target} multiplies the coefficient, so "
                "coef must be > 0 to start from; ReMoE starts at 1e-8"
            )

    def prepare(self, router: Router) -> None:
        """See `BalanceConfig.prepare`: with a target, the router keeps the coefficient."""
        if self.target is not None:
            router.register_buffer(_BUFFER, torch.tensor(self.coef, dtype=torch.float32))

    def coefficient(self, router: Router) -> float | Tensor:
        """See `BalanceConfig.coefficient`."""
        return self.coef if self.target is None else router.get_buffer(_BUFFER)

    def loss(self, routing: Routing, mixture: Mixture) -> Float[Tensor, ""]:
        """See `BalanceConfig.loss`."""
        if isinstance(mixture.router, ReluRouter):
            parts_TW = routing.weights
        else:
            parts_TW = F.normalize(routing.probs, dim=-1)
        amount_W = stats.token_mean(parts_TW, routing)
        return (amount_W * self._relative_use(routing)).sum() if self.balanced else amount_W.sum()

    def _relative_use(self, routing: Routing) -> Float[Tensor, " W"]:
        """Each expert's use over that of perfect balance."""
        if self.target is None:
            return stats.load(routing) * routing.logits.shape[-1]
        used_TW = (routing.weights.detach() != 0).to(routing.probs.dtype)
        return stats.token_mean(used_TW, routing) / self.target

    @torch.no_grad()
    def after_step(
        self, router: Router, tokens: Float[Tensor, ""], uses: Float[Tensor, " W"]
    ) -> None:
        """See `BalanceConfig.after_step`: raise the coefficient where too many experts are used."""
        if self.target is None:
            return
        own_E = uses[: router.num_experts]
        # Both sides times tokens * E: a step without tokens changes nothing.
        sign = (own_E.sum() - self.target * tokens * router.num_experts).sign()
        coef = router.get_buffer(_BUFFER)
        coef.mul_(self.alpha ** sign.to(coef)).clamp_(_LEAST, _MOST)


_BUFFER = "sparsity_coef"
# A target out of reach would otherwise drive the coefficient to zero or infinity.
_LEAST, _MOST = 1e-12, 1e4


def _is_adaptive(router: Router) -> bool:
    return router.adaptive
