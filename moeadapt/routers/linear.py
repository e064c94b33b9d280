"""Routers with a gate: one linear map from the hidden state to the logits, in float32.

Letters: T tokens, D width of the hidden states, E experts, W experts and null experts.
"""

from abc import ABC
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from moeadapt.routers.base import Router, RouterConfig
from moeadapt.routers.float32_linear import float32_linear
from moeadapt.routers.scheduled import Scheduled
from moeadapt.routing import Routing, TokenContext


def renormalize(weights: Float[Tensor, "T W"]) -> Float[Tensor, "T W"]:
    """Divide each row by its sum, which must not be zero."""
    return weights / weights.sum(-1, keepdim=True)


class LinearRouterConfig(RouterConfig, ABC):
    """Options shared by every router whose logits are one linear map of the hidden state.

    Attributes:
        temperature: logits are divided by it, >= 1e-6; above 1 flattens the choice.
        bias: whether the gate adds a learned bias per expert.
        norm: normalisation of the hidden state before the gate: `none`, `rms` (unit root mean
            square) or `standardize` (zero mean, unit variance).
        init_std: standard deviation of the initial gate, > 0: an all-zero gate would send every
            token to the same experts.
        input: `hidden`, or `stop_gradient` to keep the router's gradient out of the model.
        freeze: never train the router.
        per: `token`, or `sequence`: one decision per sequence, from the mean of its real tokens;
            in generation the decision of the prompt is kept.
        cost_aware: logits are lowered by this times the rank of the expert over the largest rank,
            >= 0, so that large experts are used only where they help (HMoE, Wang et al. 2024,
            https://arxiv.org/abs/2408.10681); without effect on experts of equal rank.
    """

    temperature: Annotated[float, Field(ge=1e-6)] = 1.0
    bias: bool = False
    norm: Literal["none", "rms", "standardize"] = "none"
    init_std: Annotated[float, Field(gt=0.0)] = 0.02
    input: Literal["hidden", "stop_gradient"] = "hidden"
    freeze: bool = False
    per: Literal["token", "sequence"] = "token"
    cost_aware: Annotated[float, Field(ge=0.0)] = 0.0


class LinearRouter(Scheduled, Router, ABC):
    """A router with a gate: one linear map from the hidden state to E logits, in float32.

    Attributes:
        k: experts per token, null experts included; None: the router has no such number.
        temperature: what logits are divided by now.
        costs: what each expert costs, where the router heeds it; else empty.
        gate_dropout: share of logits hidden in training, so that other experts are tried; a token
            whose logits would all be hidden keeps them all.
    """

    gate_per_expert: ClassVar[bool] = True

    def __init__(
        self,
        config: LinearRouterConfig,
        dim: int,
        num_experts: int,
        *,
        max_active: int,
        sums_to_one: bool,
        null_experts: int = 0,
        rows: int | None = None,
    ) -> None:
        """Make the gate; `rows` are its outputs, one per expert unless said otherwise."""
        super().__init__(
            num_experts,
            max_active=max_active,
            sums_to_one=sums_to_one,
            frozen=config.freeze,
            null_experts=null_experts,
            per=config.per,
        )
        self.config = config
        self.k: int | None = None
        self.temperature = config.temperature
        self.gate_dropout = 0.0
        rows = rows or self.width
        self.weight = nn.Parameter(torch.empty(rows, dim))
        nn.init.normal_(self.weight, std=config.init_std)
        self.bias = nn.Parameter(torch.zeros(rows)) if config.bias else None
        self.costs: tuple[float, ...] = ()
        self._costs_on: dict[torch.device, Tensor] = {}

    def set_costs(self, costs: tuple[float, ...]) -> None:
        """Say what each expert costs, relative to the dearest; null experts cost nothing."""
        self.costs = (*costs, *[0.0] * self.null_experts) if self.config.cost_aware else ()
        self._costs_on = {}

    def _costs_like(self, logits: Float[Tensor, "T W"]) -> Float[Tensor, " W"]:
        """Return the costs on the device, sent there once."""
        if logits.device not in self._costs_on:
            self._costs_on[logits.device] = torch.tensor(self.costs, device=logits.device)
        return self._costs_on[logits.device].to(logits.dtype)

    def features(self, hidden: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """Return what the gate sees: `hidden`, normalised, at least float32."""
        if self.config.input == "stop_gradient":
            hidden = hidden.detach()
        x = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        if self.config.norm == "rms":
            x = F.rms_norm(x, x.shape[-1:])
        elif self.config.norm == "standardize":
            x = F.layer_norm(x, x.shape[-1:])
        return x

    def linear(
        self, hidden: Float[Tensor, "T D"], weight: Tensor, bias: Tensor | None = None
    ) -> Float[Tensor, "T O"]:
        """Map the features of `hidden` by a matrix of the router's own, autocast off."""
        if self.config.norm == "none":
            x = hidden.detach() if self.config.input == "stop_gradient" else hidden
        else:
            with torch.autocast(hidden.device.type, enabled=False):
                x = self.features(hidden)
        return float32_linear(x, weight, bias)

    def logits(self, hidden: Float[Tensor, "T D"]) -> Float[Tensor, "T W"]:
        """Scores of each expert, at least float32, autocast off."""
        return self.finish(self.linear(hidden, self.weight, self.bias))

    def finish(self, logits: Float[Tensor, "T W"]) -> Float[Tensor, "T W"]:
        """Apply the temperature, the costs and, in training, the gate dropout."""
        if self.temperature != 1.0:
            logits = logits / self.temperature
        if self.costs:
            logits = logits - self.config.cost_aware * self._costs_like(logits)
        if self.training and self.gate_dropout > 0:
            dropped = torch.rand_like(logits) < self.gate_dropout
            dropped = dropped & ~dropped.all(-1, keepdim=True)
            logits = logits.masked_fill(dropped, _HIDDEN)
        return logits

    def routing(
        self,
        tokens: TokenContext,
        *,
        logits: Float[Tensor, "T W"],
        probs: Float[Tensor, "T W"],
        weights: Float[Tensor, "T W"],
    ) -> Routing:
        """Put the results together."""
        return Routing(
            logits=logits,
            probs=probs,
            weights=weights,
            max_active=self.max_active,
            token_mask=tokens.mask,
            null_experts=self.null_experts,
        )

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"{self.weight.shape[1]} -> {self.num_experts}, {self.config!r}"


# Low enough that no softmax or sigmoid chooses it, and finite in every loss.
_HIDDEN = -1e4
