"""One linear with its experts, `onto + sum_e weights[:, e] * expert_e(x)`, and its definition.

Letters: T tokens, D in, O out, E experts.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from moeadapt.dispatch.choice import choose
from moeadapt.dispatch.sparse import gather, grouped
from moeadapt.experts.base import ExpertBank


def dispatch(
    x: Float[Tensor, "T D"],
    weights: Float[Tensor, "T E"] | None,
    bank: ExpertBank,
    onto: Float[Tensor, "T O"],
    *,
    inplace: bool = False,
    max_active: int | None = None,
) -> Float[Tensor, "T O"]:
    """Return `onto + sum_e weights[:, e] * expert_e(x)`, shared experts with weight 1.

    In the form that `choose` names; the usual one, `concat`, is two matrix products over the ranks
    of all experts with the routing weights between them, so all shapes are static and nothing is
    sorted or synchronised.

    Args:
        x: tokens that the experts read: the linear's input, or that of the whole FFN for experts
            that stand beside it.
        weights: routing weights, 0 for experts not chosen; None: 1 for every expert (a bank of one
            expert is then an ordinary LoRA).
        bank: the experts.
        onto: the base output.
        inplace: accumulate into `onto`'s memory. Only for a tensor that nobody else reads and that
            is not a view: on a view autograd copies it several times in backward.
        max_active: upper bound on the experts of one token; None: all of them. The sparse forms
            give no gradient to the weight of an expert beyond it, so the router must give none
            either, as every router with such a bound does.

    Raises:
        UnsupportedError: see `choose`.
    """
    form = "concat" if weights is None else choose(bank, x, max_active)
    if weights is not None and max_active is not None:
        if form == "grouped":
            return grouped(x, weights, bank, onto, max_active)
        if form == "gather":
            return gather(x, weights, bank, onto, max_active)
    hidden = bank.down(x)
    scaled = None if weights is None else bank.scaled(weights, hidden.dtype)
    return bank.up(bank.gate(hidden, scaled), onto, inplace)


def dispatch_reference(
    x: Float[Tensor, "T D"],
    weights: Float[Tensor, "T E"],
    bank: ExpertBank,
    onto: Float[Tensor, "T O"],
) -> Float[Tensor, "T O"]:
    """Define `dispatch`: one token and one expert at a time."""
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
