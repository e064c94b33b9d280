"""A learning rate, a weight decay and a gradient norm of their own for the routers."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from moeadapt.errors import ConfigError
from moeadapt.routers import Router


@dataclass(frozen=True, kw_only=True)
class RouterOptions:
    """What is different for routers; None: nothing.

    Attributes:
        learning_rate: peak learning rate of the routers, > 0.
        weight_decay: weight decay of the routers, >= 0.
        max_grad_norm: largest norm of the gradients of all routers together, > 0.

    Raises:
        ConfigError: an option is out of range.
    """

    learning_rate: float | None = None
    weight_decay: float | None = None
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int | float | None):
                raise ConfigError(f"router_{name}={value!r} must be a number, or None")
        for name in ("learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"router_{name}={value!r} must be a finite number > 0, or None")
        if self.weight_decay is not None and not 0 <= self.weight_decay < math.inf:
            raise ConfigError(
                f"router_weight_decay={self.weight_decay!r} must be a finite number >= 0, or None"
            )

    def keywords(self) -> dict[str, float | None]:
        """Return them as the keywords that trainers take."""
        return {f"router_{name}": value for name, value in vars(self).items()}

    @property
    def own_group(self) -> bool:
        """Whether an optimizer needs groups of their own for them."""
        return self.learning_rate is not None or self.weight_decay is not None

    def filled_from(self, other: "RouterOptions") -> "RouterOptions":
        """Return these options, those that are None from `other`."""
        return RouterOptions(
            **{k: v if v is not None else getattr(other, k) for k, v in vars(self).items()}
        )


def split_router_params(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    *,
    learning_rate: float | None = None,
    weight_decay: float | None = None,
) -> None:
    """Move the routers' parameters into groups of their own.

    Call it before the first step and before a scheduler is made. Without options nothing changes,
    and calling it again does nothing.

    Args:
        optimizer: made over the parameters of `model`.
        model: the model.
        learning_rate: peak learning rate of the routers, > 0; None: that of their group.
        weight_decay: weight decay of the routers, >= 0; None: that of their group.

    Raises:
        ConfigError: an option is out of range.
    """
    RouterOptions(learning_rate=learning_rate, weight_decay=weight_decay)
    options = {
        name: value
        for name, value in (("lr", learning_rate), ("weight_decay", weight_decay))
        if value is not None
    }
    if not options:
        return
    routers = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, Router)
        for parameter in module.parameters()
    }
    for group in list(optimizer.param_groups):
        mine = [p for p in group["params"] if id(p) in routers]
        if not mine or group.get(MARK):
            continue
        group["params"] = [p for p in group["params"] if id(p) not in routers]
        optimizer.add_param_group({**group, **options, "params": mine, MARK: True})


MARK = "moeadapt_router"
"""Key of an optimizer group that holds routers only."""
