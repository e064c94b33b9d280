"""Sends tokens through their experts: the fast forms, and beside them their slow definitions.

The routing weights multiply the rank axis of the experts (the hidden axis of those that are small
FFNs), never their outputs: no tensor has both an expert and an output axis, all shapes are static,
and nothing is sorted or synchronised.

Letters: T tokens, D in, O out, E experts, N routed + shared experts, K slots, F width of the FFN.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from moeadapt.experts.base import ExpertBank


def with_shared(weights: Float[Tensor, "*T E"], num_shared: int) -> Float[Tensor, "*T N"]:
    """Append a weight of 1 for each always-on expert."""
    return F.pad(weights, (0, num_shared), value=1.0) if num_shared else weights


def mix(
    x: Float[Tensor, "T D"],
    weights: Float[Tensor, "T E"] | None,
    bank: ExpertBank,
    onto: Float[Tensor, "T O"],
    *,
    inplace: bool = False,
) -> Float[Tensor, "T O"]:
    """Return `onto + sum_e weights[:, e] * expert_e(x)`, shared experts with weight 1.

    Args:
        x: tokens that the experts read: the linear's input, or that of the whole FFN for experts
            that stand beside it.
        weights: routing weights, 0 for experts not chosen; None: 1 for every expert (a bank of one
            expert is then an ordinary LoRA).
        bank: the experts.
        onto: the base output.
        inplace: accumulate into `onto`'s memory. Only for a tensor that nobody else reads and that
            is not a view: on a view autograd copies it several times in backward.
    """
    if weights is not None:
        weights = with_shared(weights, bank.size.num_shared)
    gated = bank.gate(bank.down(x), weights)
    return bank.up(gated, onto, inplace)


def mix_reference(
    x: Float[Tensor, "T D"],
    weights: Float[Tensor, "T E"],
    bank: ExpertBank,
    onto: Float[Tensor, "T O"],
) -> Float[Tensor, "T O"]:
    """Define `mix`: one token and one expert at a time."""
    rows = []
    for t in range(x.shape[0]):
        token, base = x[t : t + 1], onto[t : t + 1]
        row = onto[t]
        for e in range(bank.size.num_experts):
            row = row + weights[t, e].to(x.dtype) * bank.apply_one(token, e, base)[0]
        for e in range(bank.size.num_experts, bank.size.total_experts):
            row = row + bank.apply_one(token, e, base)[0]
        rows.append(row)
    return torch.stack(rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class Slots:
    """One routing as K slots per token, for experts that span a whole FFN.

    Slot 0 is the reference that the mixture is written around (see `combine`): the best expert
    when the weights sum to one, otherwise the base FFN, which takes what the experts leave of 1.

    Attributes:
        choice: one-hot expert of each slot; a row of zeros is the base FFN.
        weights: weight of each slot; they sum to one over K.
    """

    choice: Float[Tensor, "K T E"]
    weights: Float[Tensor, "K T"]

    @staticmethod
    def of(weights: Float[Tensor, "T E"], max_active: int, *, sums_to_one: bool) -> "Slots":
        """Split dense weights into slots, gradients included."""
        values_TK, experts_TK = weights.topk(max_active, dim=-1)
        # Not F.one_hot, which reads the indices back to the host to check them.
        every_E = torch.arange(weights.shape[-1], device=weights.device)
        choice_KTE = (experts_TK.t().unsqueeze(-1) == every_E).to(weights.dtype)
        values_KT = values_TK.t()
        if not sums_to_one:
            rest = 1 - values_KT.sum(0, keepdim=True)
            values_KT = torch.cat([rest, values_KT])
            choice_KTE = torch.cat([torch.zeros_like(choice_KTE[:1]), choice_KTE])
        return Slots(choice=choice_KTE, weights=values_KT)


def expand(
    x: Float[Tensor, "T D"], slots: Slots, bank: ExpertBank, onto: Float[Tensor, "T F"]
) -> Float[Tensor, "K T F"]:
    """Return each slot's own projection of a token; `onto`, the base output, is computed once."""
    hidden = bank.down(x)
    choice = with_shared(slots.choice, bank.size.num_shared)
    gated = bank.gate(hidden.unsqueeze(0).expand(choice.shape[0], *hidden.shape), choice)
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
    choice = with_shared(slots.choice, bank.size.num_shared) * slots.weights.unsqueeze(-1)
    gated = bank.gate(bank.down(dropout(activations)), choice).sum(0)
    return bank.up(gated, onto, False)


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
