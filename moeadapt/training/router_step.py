"""What an optimizer step does differently for the routers: freeze, clip, learn at another rate.

It happens in hooks of the optimizer, so any loop has it: a GradScaler has unscaled the gradients by
then, and a trainer has clipped the norm of all gradients. In this order:

1. a frozen router's gradient is dropped, so that neither momentum nor weight decay moves it;
2. the gradients of the other routers are scaled so that their own norm is at most `max_grad_norm`;
3. the step runs with the routers in groups of their own: rate, weight decay, warm-up;
4. the groups are as before: schedulers and checkpoints see those that they know.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from moeadapt.errors import ConfigError
from moeadapt.training.param_groups import MARK, RouterOptions
from moeadapt.tuner.head import RouterHead
from moeadapt.tuner.inspect import heads_of


def attach_optimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    router_learning_rate: float | None = None,
    router_weight_decay: float | None = None,
    router_max_grad_norm: float | None = None,
) -> "RouterStep":
    """Let an optimizer follow the schedule of `model`, and treat its routers separately.

    The trainers of moeadapt.training and MoeAdaptCallback do it; call it once in a loop of your
    own. Attaching again replaces what was attached, but for options that are None.

    Args:
        model: the model, in any wrapper.
        optimizer: any optimizer of torch, in any wrapper of accelerate.
        router_learning_rate: peak learning rate of the routers, > 0; a scheduler scales it as it
            scales the common one. None: the common one.
        router_weight_decay: weight decay of the routers, >= 0; None: the common one.
        router_max_grad_norm: largest norm of the gradients of all routers together, > 0; None: not
            clipped on their own.

    Returns:
        What was attached; its `remove` undoes it.

    Raises:
        ConfigError: an option is out of range, the common learning rate is 0, or the model has no
            moeadapt adapter.
    """
    options = RouterOptions(
        learning_rate=router_learning_rate,
        weight_decay=router_weight_decay,
        max_grad_norm=router_max_grad_norm,
    )
    inner: Any = optimizer
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    before: RouterStep | None = getattr(inner, _ATTRIBUTE, None)
    if before is not None:
        options = options.filled_from(before.options)
        before.remove()
    step = RouterStep(list(heads_of(model).values()), inner, options)
    setattr(inner, _ATTRIBUTE, step)
    return step


_ATTRIBUTE = "_moeadapt_router_step"


class RouterStep:
    """The hooks on one optimizer.

    Attributes:
        options: what is different for routers.
    """

    def __init__(
        self, heads: list[RouterHead], optimizer: torch.optim.Optimizer, options: RouterOptions
    ) -> None:
        """Attach."""
        for group in optimizer.param_groups:
            _check_peak(group, options)
        self.options = options
        self._heads = heads
        self._optimizer = optimizer
        self._lent: list[tuple[dict[str, Any], list[Any]]] = []
        self._num_groups = 0
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]
        for head in heads:
            head.optimizer_attached = True

    def remove(self) -> None:
        """Detach."""
        self._after()
        for handle in self._handles:
            handle.remove()
        for head in self._heads:
            head.optimizer_attached = False
        vars(self._optimizer).pop(_ATTRIBUTE, None)

    def _before(self, *_: Any) -> None:
        self._after()  # a step that failed did not come back
        rates: dict[int, float] = {}
        learning = []
        for head in self._heads:
            for parameter in head.router.parameters():
                if head.values.frozen:
                    parameter.grad = None
                elif parameter.grad is not None:
                    learning.append(parameter)
                rates[id(parameter)] = head.values.rate
        if self.options.max_grad_norm is not None and learning:
            self._clip(learning, self.options.max_grad_norm)
        if self.options.own_group or any(rate != 1.0 for rate in rates.values()):
            self._lend(rates)

    def _clip(self, routers: list[nn.Parameter], max_norm: float) -> None:
        norm = get_total_norm([p.grad for p in routers if p.grad is not None])
        # A fused optimizer unscales the gradients itself, later.
        scale = getattr(self._optimizer, "grad_scale", None)
        limit: Any = max_norm if scale is None else max_norm * scale.to(norm.device)
        clip_grads_with_norm_(routers, limit, norm)

    def _lend(self, rates: dict[int, float]) -> None:
        """Put the routers into groups of their own for this step."""
        groups = self._optimizer.param_groups
        self._num_groups = len(groups)
        for group in list(groups):
            parts: dict[float | None, list[Any]] = {}
            for parameter in group["params"]:
                parts.setdefault(rates.get(id(parameter)), []).append(parameter)
            self._lent.append((group, group["params"]))
            group["params"] = parts.pop(None, [])
            for rate, mine in parts.items():
                assert rate is not None
                groups.append({**group, **self._own(group, rate), "params": mine})

    def _own(self, group: dict[str, Any], rate: float) -> dict[str, Any]:
        if group.get(MARK):
            return {"lr": group["lr"] * rate}
        changed: dict[str, Any] = {}
        if self.options.learning_rate is not None:
            rate = rate * self.options.learning_rate / float(_peak(group))
        changed["lr"] = group["lr"] * rate
        if self.options.weight_decay is not None:
            changed["weight_decay"] = self.options.weight_decay
        return changed

    def _after(self, *_: Any) -> None:
        if not self._lent:
            return
        for group, parameters in self._lent:
            group["params"] = parameters
        self._lent = []
        del self._optimizer.param_groups[self._num_groups :]


def _peak(group: dict[str, Any]) -> Any:
    return group.get("initial_lr", group["lr"])


def _check_peak(group: dict[str, Any], options: RouterOptions) -> None:
    if options.learning_rate is None or group.get(MARK) or _peak(group) > 0:
        return
    raise ConfigError(
        f"router_learning_rate={options.learning_rate} follows the schedule of the common learning "
        f"rate, which is {_peak(group)}; use a trainer of moeadapt.training, or call "
        "split_router_params before the scheduler is made"
    )
