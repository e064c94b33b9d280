"""What every router is: hidden states in, a `Routing` out.

Letters: T tokens, D width of the hidden states, E experts, W experts and null experts.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from moeadapt.errors import ConfigError
from moeadapt.registry import ComponentConfig
from moeadapt.routers.scheduled import Scheduled
from moeadapt.routing import Routing, TokenContext

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
"""A float in [0, 1]."""


class Router(nn.Module, ABC):
    """Chooses experts for each token.

    Its parameters are its own (no submodules): PEFT's file format, ZeRO-3 and FSDP1 all expect the
    adapter's tensors on leaf modules. They stay float32 whatever the model is cast to, because a
    bfloat16 router loses most of its updates.

    Attributes:
        causal: whether a token's routing depends on nothing that comes later in its sequence.
        needs: fields of `TokenContext`, besides the mask, that must be known.
        ranks_with_bias: whether `selection_bias` changes what is chosen.
        acts_after_step: whether `after_step` does something.
        num_experts: E.
        null_experts: experts that change nothing, chosen like the others; the last columns.
        max_active: upper bound on the experts of one token, null experts left out.
        sums_to_one: whether each row of weights sums to one.
        frozen: whether training must leave the router as it is.
        per: `token`, or `sequence` for one decision for all tokens of a sequence.
        selection_bias: added to the scores for the choice only, never to a weight; None: none.
            Not trained by gradient: the balance loss `loss_free` moves it.
    """

    causal: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()
    ranks_with_bias: ClassVar[bool] = False
    acts_after_step: ClassVar[bool] = False
    selection_bias: Tensor | None

    def __init__(
        self,
        num_experts: int,
        *,
        max_active: int,
        sums_to_one: bool,
        frozen: bool = False,
        null_experts: int = 0,
        per: str = "token",
    ) -> None:
        """Record what dispatch needs to know before it sees a token."""
        super().__init__()
        self.num_experts = num_experts
        self.null_experts = null_experts
        self.max_active = max_active
        self.sums_to_one = sums_to_one
        self.frozen = frozen
        self.per = per
        self.register_buffer("selection_bias", None)

    @property
    def width(self) -> int:
        """W, the columns of a routing."""
        return self.num_experts + self.null_experts

    def all_needs(self) -> frozenset[str]:
        """Return the fields of `TokenContext` that this router needs as it is set up."""
        return self.needs | ({"sequences"} if self.per == "sequence" else set())

    def add_selection_bias(self) -> None:
        """Make the selection bias, zero; saved with the adapter."""
        self.selection_bias = torch.zeros(self.width)

    def ranked(self, scores: Float[Tensor, "T W"]) -> Float[Tensor, "T W"]:
        """Return what the choice is made by: scores plus the selection bias, without gradient."""
        scores = scores.detach()
        if self.selection_bias is None:
            return scores
        return scores + self.selection_bias.to(scores.dtype)

    @abstractmethod
    def forward(self, hidden: Float[Tensor, "T D"], tokens: TokenContext) -> Routing:
        """Route `hidden`.

        Args:
            hidden: hidden states, any float dtype; computed in float32 (float64 stays).
            tokens: what else is known about the tokens.
        """

    def after_step(self, uses: Float[Tensor, " W"], reduce: Callable[[Tensor], Tensor]) -> None:
        """Change what is not trained by gradient; called after each optimizer step.

        Args:
            uses: tokens that used each expert in this step, over all processes.
            reduce: sums a tensor over all processes, each of which calls it.
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


def renormalize(weights: Float[Tensor, "T W"]) -> Float[Tensor, "T W"]:
    """Divide each row by its sum, which must not be zero."""
    return weights / weights.sum(-1, keepdim=True)


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
        per: `token`, or `sequence`: one decision per sequence, from the mean of its real tokens;
            in generation the decision of the prompt is kept.
        cost_aware: logits are lowered by this times the rank of the expert over the largest rank,
            >= 0, so that large experts are used only where they help (HMoE, Wang et al. 2024,
            https://arxiv.org/abs/2408.10681); without effect on experts of equal rank.
    """

    temperature: Annotated[float, Field(gt=0.0)] = 1.0
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
        gate_dropout: share of logits hidden in training, so that other experts are tried; a token
            whose logits would all be hidden keeps them all.
    """

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

    def set_costs(self, costs: tuple[float, ...]) -> None:
        """Say what each expert costs, relative to the dearest; read by `cost_aware`."""
        self.costs = costs if self.config.cost_aware else ()

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
        with torch.autocast(hidden.device.type, enabled=False):
            x = self.features(hidden)
            return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def logits(self, hidden: Float[Tensor, "T D"]) -> Float[Tensor, "T W"]:
        """Scores of each expert, at least float32, autocast off."""
        return self.finish(self.linear(hidden, self.weight, self.bias))

    def finish(self, logits: Float[Tensor, "T W"]) -> Float[Tensor, "T W"]:
        """Apply the temperature, the costs and, in training, the gate dropout."""
        if self.temperature != 1.0:
            logits = logits / self.temperature
        if self.costs:
            costs_E = logits.new_tensor(self.costs)
            logits = logits - self.config.cost_aware * costs_E
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
