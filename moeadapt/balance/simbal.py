"""SimBal: keeps the gate's rows orthonormal, so that tokens as similar as before stay so in logits.

It looks at the gate alone, never at tokens: 0 when the rows are orthonormal, E * (E - 1) when all
rows are the same unit vector, which routes every token to all experts alike.

Letters: D width, W experts and null experts.

Source: Omi et al. 2025, https://arxiv.org/abs/2506.14038: the loss is the 1-norm of R^T R - I for
the [D, E] router matrix R, here the sum of absolute entries. They also start from an orthogonal
gate; ours starts as `init_std` says, and the loss pulls it there. More experts than the hidden
state is wide cannot be orthonormal; the loss then ends above 0.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from moeadapt.balance.base import BalanceConfig, Mixture, routers_where
from moeadapt.errors import ConfigError
from moeadapt.routers import LinearRouter, Router
from moeadapt.routing import Routing


class SimbalConfig(BalanceConfig):
    """Sum of |W W^T - I| over the entries, W the gate's matrix."""

    def check(self, router: Router) -> None:
        """See `BalanceConfig.check`; the gate must have one row per expert."""
        if not _has_gate(router):
            raise ConfigError(
                f"balance loss 'simbal' needs a router with a gate of one row per expert, which a "
                f"{type(router).__name__} does not have; use one of {routers_where(_has_gate)}"
            )

    def loss(self, routing: Routing, mixture: Mixture) -> Float[Tensor, ""]:
        """See `BalanceConfig.loss`."""
        assert isinstance(mixture.router, LinearRouter)
        gate_WD = mixture.router.weight
        with torch.autocast(gate_WD.device.type, enabled=False):
            gram_WW = gate_WD @ gate_WD.T
        unit_WW = torch.eye(len(gram_WW), dtype=gram_WW.dtype, device=gram_WW.device)
        return (gram_WW - unit_WW).abs().sum()


def _has_gate(router: Router) -> bool:
    return router.gate_per_expert
