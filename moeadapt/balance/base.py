"""What every balance loss is: a `Routing` in, a scalar out."""

from abc import ABC, abstractmethod
from typing import Annotated

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from moeadapt.registry import ComponentConfig
from moeadapt.routing import Routing


class BalanceConfig(ComponentConfig, ABC):
    """Settings of one balance loss, which is a pure function of one router's routing.

    Attributes:
        coef: what the loss is multiplied by before it is added to the task loss, >= 0.
    """

    coef: Annotated[float, Field(ge=0.0)] = 0.01

    @abstractmethod
    def loss(self, routing: Routing) -> Float[Tensor, ""]:
        """Compute the loss over the real tokens of `routing`, before `coef`."""
