"""A learning rate and a weight decay of their own for the routers."""

import torch
from torch import nn

from moeadapt.errors import ConfigError
from moeadapt.routers import Router


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
    if learning_rate is not None and not learning_rate > 0:
        raise ConfigError(f"router_learning_rate={learning_rate!r} must be > 0, or None")
    if weight_decay is not None and not weight_decay >= 0:
        raise ConfigError(f"router_weight_decay={weight_decay!r} must be >= 0, or None")
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
        if not mine or group.get(_MARK):
            continue
        group["params"] = [p for p in group["params"] if id(p) not in routers]
        optimizer.add_param_group({**group, **options, "params": mine, _MARK: True})


_MARK = "moeadapt_router"
