"""How alike the weight changes of a router's experts are, without making one of them.

The inner product of two low-rank changes needs their factors alone:

    <B_i A_i, B_j A_j> = sum((B_i^T B_j) * (A_i A_j^T))

so all pairs of experts are two Gram matrices, one product of their entries, and sums over blocks.

Letters: D in, O out, E experts, N routed and shared experts, r rank of one expert, R all ranks.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from moeadapt.experts import ExpertBank
from moeadapt.experts.heterogeneous import HeterogeneousBank
from moeadapt.experts.lora import LoraBank
from moeadapt.experts.shared_a import SharedABank
from moeadapt.experts.shared_b import SharedBBank

KNOWN = (LoraBank, HeterogeneousBank, SharedABank, SharedBBank)
"""Banks of which expert e is `scale * B_e A_e`; where a factor is common, all have it."""


def cosines(banks: Sequence[ExpertBank]) -> Float[Tensor, "E E"] | None:
    """Return the cosines of the experts' weight changes, over all linears together.

    Shared experts are left out. Zero beside an expert that changes nothing.

    Args:
        banks: all that one router routes to.

    Returns:
        None: the experts are no matrices of their own (`ia3`, `glu`, `random_a`), or change
        nothing at all.
    """
    if not banks or any(type(bank) not in KNOWN or not bank.linear for bank in banks):
        return None
    total_EE = torch.stack([products(bank).cpu().double() for bank in banks]).sum(0)
    total_EE = (total_EE + total_EE.T) / 2  # rounding aside, they are equal
    norm_E = total_EE.diagonal().clamp(min=0).sqrt()
    if not norm_E.any():
        return None
    scale_EE = norm_E.unsqueeze(-1) * norm_E
    cosine_EE = total_EE / torch.where(scale_EE == 0, torch.ones_like(scale_EE), scale_EE)
    return torch.where(scale_EE == 0, torch.zeros_like(cosine_EE), cosine_EE).clamp(-1, 1)


def products(bank: ExpertBank) -> Float[Tensor, "E E"]:
    """Return the inner product of each two routed experts' `delta_weight`.

    Args:
        bank: one of `KNOWN`.
    """
    size = bank.size
    with torch.no_grad():
        a, b = (_whole(bank.factor(name).weight) for name in ("lora_A", "lora_B"))
        a_gram, b_gram = a @ a.T, b.T @ b
        if isinstance(bank, SharedABank):
            a_gram = a_gram.repeat(size.total_experts, size.total_experts)
        if isinstance(bank, SharedBBank):
            b_gram = b_gram.repeat(size.total_experts, size.total_experts)
        ranks_N = torch.tensor(size.all_ranks, device=a.device)
        experts_R = torch.arange(len(ranks_N), device=a.device).repeat_interleave(ranks_N)
        owner_RN = torch.nn.functional.one_hot(experts_R, len(ranks_N)).to(a.dtype)
        owner_RE = owner_RN[:, : size.num_experts]
        return size.scale**2 * (owner_RE.T @ (a_gram * b_gram) @ owner_RE)


def _whole(factor: Tensor) -> Tensor:
    return factor.to(torch.promote_types(factor.dtype, torch.float32))
