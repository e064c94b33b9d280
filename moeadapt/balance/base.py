"""What every balance loss is: a `Routing` in, a scalar out.

Letters: T tokens, D width, W experts and null experts.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from moeadapt.errors import ConfigError
from moeadapt.experts import ExpertBank
from moeadapt.registry import ComponentConfig
from moeadapt.routers import ROUTERS, Router
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

    shorthand: ClassVar[str] = "coef"
    """The field that a number alone means, as in `{"switch": 0.01}`."""

    coef: Annotated[float, Field(ge=0.0)] = 0.01

    @property
    def acts_after_step(self) -> bool:
        """Whether `after_step` does something: it then costs communication."""
        return False

    @abstractmethod
    def loss(self, routing: Routing, mixture: Mixture) -> Float[Tensor, ""]:
        """Compute the loss over the real tokens of `routing`, before its coefficient."""

    @property
    def reads_hidden(self) -> bool:
        """Whether `loss` reads `Mixture.hidden`, so that the first bank must see it."""
        return False

    def check(self, router: Router) -> None:
        """Refuse a router that this loss cannot work with.

        Raises:
            ConfigError: says why, and which routers work.
        """

    def check_experts(self, bank: ExpertBank) -> None:
        """Refuse experts that this loss cannot work with; called for each bank of the router.

        Raises:
            ConfigError: says why, and which experts work.
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


def routers_where(works: Callable[[Router], bool]) -> str:
    """List the registered routers that a loss works with as they are by default."""
    size = 16
    return ", ".join(name for name in sorted(ROUTERS) if works(ROUTERS[name]().build(size, size)))


def null_average(values: Float[Tensor, " W"], null_experts: int) -> Float[Tensor, " W"]:
    """Give each null expert the average of them all: they are alike."""
    if not null_experts:
        return values
    own, null = values.split([len(values) - null_experts, null_experts])
    return torch.cat([own, null.mean().expand_as(null)])


def check_low_rank(loss: str, bank: ExpertBank, factors: Sequence[str]) -> None:
    """Refuse a bank whose experts do not each own `rank` directions in each of `factors`.

    Nor may all of `factors` be frozen: the loss would train nothing.

    Raises:
        ConfigError: names the loss, the expert type and what works.
    """
    wanted = bank.size.total_experts * bank.size.rank
    side = {"lora_A": 0, "lora_B": 1}
    if (
        set(factors) <= set(bank.factor_names)
        and not set(factors) <= set(bank.frozen)
        and len(set(bank.costs())) == 1
        and all(bank.factor(name).weight.shape[side[name]] == wanted for name in factors)
    ):
        return
    raise ConfigError(
        f"balance loss {loss!r} compares the experts' own {' and '.join(factors)}, which the "
        f"experts of a {type(bank).__name__} do not have, do not train, or have at different "
        "ranks; use experts='lora' or drop the loss"
    )
