"""The sparse forms of one linear: only the chosen experts are multiplied.

Letters: T tokens, D in, O out, E experts, k experts per token, r rank of one expert, R = E * r,
S = T * k pairs of a token and one of its experts, sorted by expert.
"""

import torch
from jaxtyping import Float, Int32
from torch import Tensor
from torch.nn import functional as F

from moeadapt.experts.base import ExpertBank
from moeadapt.experts.lora import multiply


def grouped(
    x: Float[Tensor, "T D"],
    weights: Float[Tensor, "T E"],
    bank: ExpertBank,
    onto: Float[Tensor, "T O"],
    k: int,
) -> Float[Tensor, "T O"]:
    """See `dispatch`: sort the pairs of token and expert, one matrix product per expert.

    For experts that are `stacked`. Costs as k, where `concat` costs as E.
    """
    a_ErD, b_ErO = _stacked(bank, x.dtype)
    weights_Tk, experts_Tk = weights.topk(k, dim=-1)
    sorted_S, order_S = experts_Tk.flatten().sort(stable=True)
    tokens_S = order_S // k
    bounds_E = torch.arange(1, a_ErD.shape[0] + 1, device=x.device)
    ends_E = torch.searchsorted(sorted_S, bounds_E).int()
    scaled_S = (weights_Tk.flatten()[order_S] * bank.size.scale).to(x.dtype)
    hidden_Sr = _per_expert(x[tokens_S], a_ErD.transpose(1, 2), ends_E)
    out_SO = _per_expert(multiply(hidden_Sr, scaled_S.unsqueeze(-1)), b_ErO, ends_E)
    # Back in the order of the tokens by a permutation, whose backward is one too.
    back_S = torch.empty_like(order_S).scatter_(
        0, order_S, torch.arange(order_S.shape[0], device=x.device)
    )
    routed = out_SO[back_S].unflatten(0, (x.shape[0], k)).sum(1)
    return _add_shared(x, bank, onto + routed.to(onto.dtype))


def gather(
    x: Float[Tensor, "T D"],
    weights: Float[Tensor, "T E"],
    bank: ExpertBank,
    onto: Float[Tensor, "T O"],
    k: int,
) -> Float[Tensor, "T O"]:
    """See `dispatch`: copy each token's experts, then multiply.

    For experts that are `stacked`, and few tokens: the copies are [T, k, r, D].
    """
    a_ErD, b_ErO = _stacked(bank, x.dtype)
    weights_Tk, experts_Tk = weights.topk(k, dim=-1)
    own_a, own_b = a_ErD[experts_Tk].flatten(1, 2), b_ErO[experts_Tk].flatten(1, 2)
    hidden = torch.bmm(own_a, x.unsqueeze(-1)).view(*weights_Tk.shape, bank.size.rank)
    scaled = (weights_Tk * bank.size.scale).to(x.dtype).unsqueeze(-1)
    gated = multiply(hidden, scaled).flatten(1).unsqueeze(1)
    return _add_shared(x, bank, onto + torch.bmm(gated, own_b).squeeze(1).to(onto.dtype))


def _stacked(
    bank: ExpertBank, dtype: torch.dtype
) -> tuple[Float[Tensor, "E r D"], Float[Tensor, "E r O"]]:
    """Return the routed experts' factors, one expert behind the other."""
    rows = bank.size.num_experts * bank.size.rank
    shape = (bank.size.num_experts, bank.size.rank)
    a = bank.matrix("lora_A", dtype)[:rows].unflatten(0, shape)
    b = bank.matrix("lora_B", dtype)[:, :rows].t().unflatten(0, shape)
    return a, b


def _add_shared(x: Tensor, bank: ExpertBank, onto: Tensor) -> Tensor:
    """Add the always-on experts, which are a plain LoRA."""
    rows = bank.size.num_experts * bank.size.rank
    if not bank.size.num_shared:
        return onto
    hidden = F.linear(x, bank.matrix("lora_A", x.dtype)[rows:]) * bank.size.scale
    return onto + F.linear(hidden, bank.matrix("lora_B", x.dtype)[:, rows:]).to(onto.dtype)


def _per_expert(
    x: Float[Tensor, "S I"], matrices: Float[Tensor, "E I J"], ends: Int32[Tensor, " E"]
) -> Float[Tensor, "S J"]:
    """Multiply rows `ends[e - 1]` to `ends[e]` of `x` by `matrices[e]`."""
    if x.dtype != torch.float64:
        # A copy: strides must be multiples of 16 bytes, those of its gradient too.
        return F.grouped_mm(x, matrices.contiguous(), offs=ends)
    # The kernel knows no float64, which nobody trains in; for checking, the ends may be read.
    starts = [0, *ends.tolist()]
    return torch.cat([x[a:b] @ m for a, b, m in zip(starts, starts[1:], matrices, strict=False)])
