"""Experts that span a whole FFN, as K slots per token, and their definition.

The base matrices are multiplied once per token, whatever K: between them each token has K rows,
one per slot, and the output projection, being linear, is applied to their weighted sum.

Letters: T tokens, D in, O out, E experts, K slots, F width of the FFN.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from moeadapt.experts.base import ExpertBank


@dataclass(kw_only=True)
class Slots:
    """One routing as K slots per token, for experts that span a whole FFN.

    Slot 0 is the reference that the mixture is written around (see `combine`): the best expert
    when the weights sum to one, otherwise the base FFN, which takes what the experts leave of 1.

    Attributes:
        experts: expert of each slot; -1 is the base FFN.
        weights: weight of each slot; they sum to one over K.
        num_experts: E.
    """

    experts: Int[Tensor, "K T"]
    weights: Float[Tensor, "K T"]
    num_experts: int
    _choice: Tensor | None = field(default=None, init=False, repr=False)

    @staticmethod
    def of(weights: Float[Tensor, "T E"], max_active: int, *, sums_to_one: bool) -> "Slots":
        """Split dense weights into slots, gradients included."""
        values_TK, experts_TK = weights.topk(max_active, dim=-1)
        values_KT, experts_KT = values_TK.t(), experts_TK.t()
        if not sums_to_one:
            rest = 1 - values_KT.sum(0, keepdim=True)
            values_KT = torch.cat([rest, values_KT])
            experts_KT = F.pad(experts_KT, (0, 0, 1, 0), value=-1)
        return Slots(experts=experts_KT, weights=values_KT, num_experts=weights.shape[-1])

    @property
    def choice(self) -> Float[Tensor, "K T E"]:
        """One-hot expert of each slot; a row of zeros is the base FFN."""
        # Kept by hand: the lock inside functools.cached_property breaks a compiled graph.
        if self._choice is None:
            # Not F.one_hot, which reads the indices back to the host to check them.
            every_E = torch.arange(self.num_experts, device=self.experts.device)
            self._choice = (self.experts.unsqueeze(-1) == every_E).to(self.weights.dtype)
        return self._choice


def expand(
    hidden: Float[Tensor, "T R"], slots: Slots, bank: ExpertBank, onto: Float[Tensor, "T F"]
) -> Float[Tensor, "K T F"]:
    """Return each slot's own projection of a token; `onto`, the base output, is computed once.

    `hidden` is what `bank.down` returned for the tokens.
    """
    scaled = bank.scaled(slots.choice, hidden.dtype)
    gated = bank.gate(hidden.unsqueeze(0).expand(scaled.shape[0], *hidden.shape), scaled)
    return bank.up(gated, None, False).to(onto.dtype).add_(onto)


def combine(activations: Float[Tensor, "K T F"], slots: Slots) -> Float[Tensor, "T F"]:
    """Return `sum_k weights[k] * activations[k]`, exact where all slots agree.

    Written as slot 0 plus weighted differences: experts that change nothing then leave the base
    FFN bitwise as it was.
    """
    first = activations[0]
    if activations.shape[0] == 1:
        return first
    weights = slots.weights[1:].to(first.dtype).unsqueeze(-1)
    return first + ((activations[1:] - first) * weights).sum(0)


def contract(
    activations: Float[Tensor, "K T F"],
    slots: Slots,
    bank: ExpertBank,
    base: Callable[[Float[Tensor, "T F"]], Float[Tensor, "T O"]],
    *,
    dropout: Callable[[Tensor], Tensor] = lambda x: x,
) -> Float[Tensor, "T O"]:
    """Return `sum_k weights[k] * down_k(activations[k])`; `base` is linear, so it runs once.

    `dropout` applies to what the experts see, not to the base.
    """
    onto = base(combine(activations, slots))
    hidden = bank.down(dropout(activations))
    scaled = bank.scaled(slots.choice, slots.weights.dtype) * slots.weights.unsqueeze(-1)
    return bank.up(bank.gate(hidden, scaled.to(hidden.dtype)).sum(0), onto, False)


def ffn_reference(
    x: Float[Tensor, "T D"],
    weights: Float[Tensor, "T E"],
    expert_ffn: Callable[[Float[Tensor, "T D"], int | None], Float[Tensor, "T O"]],
) -> Float[Tensor, "T O"]:
    """Define the FFN mixture: `FFN(x) + sum_e w_e (FFN_e(x) - FFN(x))`, all experts, no tricks.

    With weights that sum to one this is `sum_e w_e FFN_e(x)` (MixLoRA, Li et al. 2024,
    https://arxiv.org/abs/2404.15159, eq. 3-6); with less, the base FFN takes the rest.

    Args:
        x: tokens.
        weights: routing weights.
        expert_ffn: `(x, e)` -> output of the whole FFN of expert `e`; `None` = without expert.
    """
    base = expert_ffn(x, None)
    experts = range(weights.shape[1])
    return base + sum(weights[:, e : e + 1] * (expert_ffn(x, e) - base) for e in experts)
