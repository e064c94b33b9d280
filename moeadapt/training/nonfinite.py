"""NaN and infinity while training: noticed before the optimizer step, and stopped or skipped."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from moeadapt.errors import ConfigError, TrainingError, did_you_mean
from moeadapt.routing import Routing
from moeadapt.tuner.inspect import heads_of
from moeadapt.tuner.probe import IGNORED

Policy = Literal["stop", "skip"]

MOST_SKIPPED = 10
"""Optimizer steps skipped one after the other before a run stops anyway."""


class NonfiniteGuard:
    """Watches the loss of each micro-batch and the gradients of each optimizer step.

    Attributes:
        policy: what to do at NaN or infinity: `stop`, or `skip` the optimizer step.
    """

    def __init__(self, policy: str = "stop") -> None:
        """Start without history.

        Raises:
            ConfigError: an unknown policy.
        """
        if policy not in get_args(Policy):
            raise ConfigError(
                f"on_nonfinite={policy!r}: one of {list(get_args(Policy))}"
                f"{did_you_mean(policy, get_args(Policy))}"
            )
        self.policy = policy
        self._in_a_row = 0
        self._loss: float | None = None
        self._where = ""

    @property
    def seen(self) -> bool:
        """Whether a loss of this optimizer step was not finite."""
        return self._loss is not None

    def observe(self, loss: Tensor, describe: Callable[[], str]) -> None:
        """Look at the loss of a micro-batch.

        Args:
            loss: what the trainer got.
            describe: says where it comes from; called at the first one that is not finite.
        """
        if self.seen or bool(torch.isfinite(loss).all()):
            return
        self._loss = float(loss.detach().float().mean())
        self._where = describe()

    def find(self, model: nn.Module, *, scaled: bool, world_size: int) -> dict[str, float]:
        """Return what is not finite in this optimizer step, by name; each process must call it.

        Args:
            model: the model, with the gradients of the step.
            scaled: whether a GradScaler looks after the gradients: it expects some overflow.
            world_size: processes.
        """
        found = {} if self._loss is None else {"loss": self._loss}
        if not scaled:
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            norm = float(get_total_norm(grads)) if grads else 0.0
            if not math.isfinite(norm):
                found["grad_norm"] = norm
        if world_size > 1:
            device = next(model.parameters()).device
            others = reduce(torch.tensor(float(bool(found)), device=device), reduction="sum")
            if float(others) > 0 and not found:  # type: ignore[arg-type]
                found["loss"] = math.nan
        if not found:
            self._in_a_row = 0
        return found

    def act(self, found: dict[str, float], model: nn.Module, step: int, *, scaled: bool) -> None:
        """Stop, or make this optimizer step do nothing.

        Args:
            found: what `find` returned, not empty.
            model: the model, with the gradients of the step.
            step: the optimizer step, counted from 1.
            scaled: see `find`.

        Raises:
            TrainingError: the policy is to stop, or too many steps were skipped.
        """
        what = " and ".join(f"{name} is {value}" for name, value in found.items())
        where, self._where, self._loss = self._where, "", None
        self._in_a_row += 1
        message = f"{what} in optimizer step {step}{where}."
        if self.policy == "stop" or self._in_a_row > MOST_SKIPPED:
            more = f" It is number {self._in_a_row} in a row." if self._in_a_row > 1 else ""
            raise TrainingError(
                f"{message}{more} The step was not done, so the weights are those of step "
                f"{step - 1}. Look at the data of this step, lower learning_rate or "
                "max_grad_norm, use bf16 instead of fp16, or pass on_nonfinite='skip' to leave "
                "such steps out"
            )
        warnings.warn(f"{message} The step is skipped (on_nonfinite='skip')", stacklevel=2)
        # With none, an optimizer moves nothing, momentum and decay included; a GradScaler wants to
        # see them, and skips the step itself.
        if not scaled:
            for parameter in model.parameters():
                parameter.grad = None


def refuse_nonfinite_weights(model: nn.Module, what: str) -> None:
    """Check the trained parameters before they are saved.

    Raises:
        TrainingError: one of them is NaN or infinite.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter.detach()).all()):
            raise TrainingError(
                f"{what} is not saved: {name} is not finite. Earlier checkpoints are as they were; "
                "lower learning_rate, and resume from the last one"
            )


@contextmanager
def checked_routers(model: nn.Module) -> Iterator[None]:
    """Check what each router returns inside the `with` block; waits for the device each time.

    Raises:
        TrainingError: a router's output is NaN or infinite; names the first.
        ConfigError: the model has no mixture of LoRA experts.
    """
    handles = [
        head.router.register_forward_hook(_check_of(name)) for name, head in heads_of(model).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def is_without_target(inputs: Any) -> bool:
    """Return whether no token of a batch of a causal language model has a label to predict.

    The first token of a row is never predicted.

    Args:
        inputs: of the model; False for anything without `labels` like its `input_ids` [B, S], and
            for no tokens at all, which the model refuses.
    """
    if not isinstance(inputs, Mapping):
        return False
    labels, ids = inputs.get("labels"), inputs.get("input_ids")
    if not isinstance(labels, Tensor) or not isinstance(ids, Tensor) or labels.shape != ids.shape:
        return False
    return labels.numel() > 0 and not bool((labels[..., 1:] != IGNORED).any())


def first_nonfinite_router(model: nn.Module, forward: Callable[[], Any]) -> str:
    """Repeat a forward to find the router where it begins; empty if it is not in a router."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), checked_routers(model):
            forward()
    except TrainingError as error:
        return f": {error}"
    return ""


def _check_of(name: str) -> Callable[..., None]:
    def check(module: nn.Module, args: tuple[Any, ...], routing: Any) -> None:
        if not isinstance(routing, Routing):
            return
        real = slice(None) if routing.token_mask is None else routing.token_mask
        wrong = ~torch.isfinite(routing.weights.detach()[real])
        if bool(wrong.any()):
            hidden = next((a for a in args if isinstance(a, Tensor)), None)
            cause = ""
            if hidden is not None and not bool(torch.isfinite(hidden).all()):
                cause = ", and so are the hidden states that it was given"
            raise TrainingError(f"the output of router {name!r} is not finite{cause}")

    return check
