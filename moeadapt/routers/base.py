"""What every router is: hidden states in, a `Routing` out.

Letters: T tokens, D width of the hidden states, E experts.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from moeadapt.errors import ConfigError
from moeadapt.registry import ComponentConfig
from moeadapt.routing import Routing, TokenContext

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
"""A float in [0, 1]."""


class Router(nn.Module, ABC):
    """Chooses experts for each token.

    Its parameters are its own (no submodules): PEFT's file format, ZeRO-3 and FSDP1 all expect the
    adapter's tensors on leaf modules. They stay float32 whatever the model is cast to, because a
    bfloat16 router loses most of its updates.

    Attributes:
        num_experts: E.
        max_active: upper bound on the experts of one token.
        sums_to_one: whether each row of weights sums to one.
        frozen: whether training must leave the router as it is.
    """

    def __init__(
        self, num_experts: int, *, max_active: int, sums_to_one: bool, frozen: bool = False
    ) -> None:
        """Record what dispatch needs to know before it sees a token."""
        super().__init__()
        self.num_experts = num_experts
        self.max_active = max_active
        self.sums_to_one = sums_to_one
        self.frozen = frozen

    @abstractmethod
    def forward(self, hidden: Float[Tensor, "T D"], tokens: TokenContext) -> Routing:
        """Route `hidden`.

        Args:
            hidden: hidden states, any float dtype; computed in float32 (float64 stays).
            tokens: what else is known about the tokens.
        """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        """Follow the model to its device, but never below float32."""
        super()._apply(partial(_keep_precision, fn), recurse)
        return self


def _keep_precision(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Apply a cast or a move, without a cast below float32."""
    moved = fn(tensor)
    if moved.dtype not in (torch.float16, torch.bfloat16):
        return moved
    source = moved if tensor.is_meta else tensor
    return source.to(device=moved.device, dtype=torch.float32)


class RouterConfig(ComponentConfig, ABC):
    """Settings of one router; `build` makes the module."""

    def check(self, num_experts: int) -> None:
        """Refuse settings that do not fit `num_experts`.

        Raises:
            ConfigError: names the field, its value and the allowed range.
        """

    @abstractmethod
    def build(self, dim: int, num_experts: int) -> Router:
        """Make the router for hidden states of width `dim`."""


def check_k(router: str, k: int, num_experts: int) -> None:
    """Refuse a `k` above the number of experts.

    Raises:
        ConfigError: names both numbers.
    """
    if k > num_experts:
        raise ConfigError(
            f"router {router!r}: k={k} is larger than num_experts={num_experts}; "
            f"choose k in 1..{num_experts}"
        )


class LinearRouterConfig(RouterConfig, ABC):
    """Options shared by every router whose logits are one linear map of the hidden state.

    Attributes:
        temperature: logits are divided by it, > 0; above 1 flattens the choice.
        bias: whether the gate adds a learned bias per expert.
        norm: normalisation of the hidden state before the gate: `none`, `rms` (unit root mean
            square) or `standardize` (zero mean, unit variance).
        init_std: standard deviation of the initial gate, > 0: an all-zero gate would send every
            token to the same experts.
        input: `hidden`, or `stop_gradient` to keep the router's gradient out of the model.
        freeze: never train the router.
    """

    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    bias: bool = False
    norm: Literal["none", "rms", "standardize"] = "none"
    init_std: Annotated[float, Field(gt=0.0)] = 0.02
    input: Literal["hidden", "stop_gradient"] = "hidden"
    freeze: bool = False


class LinearRouter(Router, ABC):
    """A router with a gate: one linear map from the hidden state to E logits, in float32."""

    def __init__(
        self,
        config: LinearRouterConfig,
        dim: int,
        num_experts: int,
        *,
        max_active: int,
        sums_to_one: bool,
    ) -> None:
        """Make the gate."""
        super().__init__(
            num_experts, max_active=max_active, sums_to_one=sums_to_one, frozen=config.freeze
        )
        self.config = config
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        nn.init.normal_(self.weight, std=config.init_std)
        self.bias = nn.Parameter(torch.zeros(num_experts)) if config.bias else None

    def logits(self, hidden: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        """Scores of each expert, at least float32, autocast off."""
        config = self.config
        with torch.autocast(hidden.device.type, enabled=False):
            if config.input == "stop_gradient":
                hidden = hidden.detach()
            x = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
            if config.norm == "rms":
                x = F.rms_norm(x, x.shape[-1:])
            elif config.norm == "standardize":
                x = F.layer_norm(x, x.shape[-1:])
            bias = None if self.bias is None else self.bias.to(x.dtype)
            logits_TE = F.linear(x, self.weight.to(x.dtype), bias)
            return logits_TE if config.temperature == 1.0 else logits_TE / config.temperature

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"{self.weight.shape[1]} -> {self.num_experts}, {self.config!r}"
