"""What every router is: hidden states in, a `Routing` out.

Letters: T tokens, D width of the hidden states, E experts, W experts and null experts.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Annotated, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

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
        causal: whether a token's routing depends on nothing that comes later in its sequence.
        needs: fields of `TokenContext`, besides the mask, that must be known.
        ranks_with_bias: whether `selection_bias` changes what is chosen.
        adaptive: whether the number of experts of a token follows from its scores.
        gate_per_expert: whether row e of the gate belongs to expert e.
        acts_after_step: whether `after_step` does something.
        record_size: length of the vector that `record` returns.
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
    adaptive: ClassVar[bool] = False
    gate_per_expert: ClassVar[bool] = False
    acts_after_step: bool = False
    record_size: int = 0
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

    @property
    def looks_ahead(self) -> bool:
        """Whether a token's routing depends on later ones: the loss of a text then sees itself."""
        return not self.causal or self.per != "token"

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

    @property
    def decodes(self) -> bool:
        """Whether `decode` gives the weights of `forward` in inference, as it is set up."""
        return False

    def decode(self, logits: Float[Tensor, "T W"]) -> Float[Tensor, "T E"]:
        """Return the weights that follow from `hidden @ weight.T + bias`, in few operations.

        For the few tokens of a decoding step, where each operation costs more than its numbers.
        Called only where `decodes` says so, and such a router has its own.
        """
        raise NotImplementedError

    def record(self, routing: Routing, hidden: Float[Tensor, "T D"]) -> Float[Tensor, " R"]:
        """Return sums over real tokens that `after_step` wants; counted once per backward."""
        return hidden.new_zeros(0)

    def after_step(
        self,
        tokens: Float[Tensor, ""],
        uses: Float[Tensor, " W"],
        record: Float[Tensor, " R"],
    ) -> None:
        """Change what is not trained by gradient; called after each optimizer step.

        Args:
            tokens: real tokens of this step, over all processes.
            uses: how many of them used each expert.
            record: the sum of what `record` returned.
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

    k_can_change: ClassVar[bool] = False
    """Whether a schedule may change the experts per token."""

    def check(self, num_experts: int) -> None:
        """Refuse settings that do not fit `num_experts`.

        Raises:
            ConfigError: names the field, its value and the allowed range.
        """

    @abstractmethod
    def build(self, dim: int, num_experts: int) -> Router:
        """Make the router for hidden states of width `dim`.

        Raises:
            ConfigError: see `check`.
        """


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
