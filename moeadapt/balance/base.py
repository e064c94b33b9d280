"""What every balance loss is: a `Routing` in, a scalar out.

Letters: T tokens, D width, W experts and null experts.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from moeadapt.experts import ExpertBank
from moeadapt.registry import ComponentConfig
from moeadapt.routers import Router
from moeadapt.routing import Routing


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """What a routing belongs to; most losses look at the routing alone.

    Attributes:
        router: the router that made it.
        banks: the banks of experts it is used by, at least one; the first one sees `hidden`.
        hidden: the hidden states that were routed.
    """

    router: Router
    banks: Sequence[ExpertBank]
    hidden: Float[Tensor, "T D"]


class BalanceConfig(ComponentConfig, ABC):
    """Settings of one balance loss, which is a pure function of one router's routing.

    Attributes:
        coef: what the loss is multiplied by before it is added to the task loss, >= 0.
    """

    acts_after_step: ClassVar[bool] = False
    """Whether `after_step` does something."""

    coef: Annotated[float, Field(ge=0.0)] = 0.01

    @abstractmethod
    def loss(self, routing: Routing, mixture: Mixture) -> Float[Tensor, ""]:
        """Compute the loss over the real tokens of `routing`, before its coefficient."""

    def check(self, router: Router) -> None:
        """Refuse a router that this loss cannot work with.

        Raises:
            ConfigError: says why, and which routers work.
        """

    def prepare(self, router: Router) -> None:
        """Give a new router what this loss keeps there (buffers, saved with the adapter)."""

    def coefficient(self, router: Router) -> float | Tensor:
        """Return what the loss is multiplied by now."""
        return self.coef

    def after_step(
        self, router: Router, tokens: Float[Tensor, ""], uses: Float[Tensor, " W"]
    ) -> None:
        """Change what `prepare` made; called after each optimizer step.

        Args:
            router: the router.
            tokens: real tokens of this step, over all processes.
            uses: how many of them used each expert.
        """
