"""Orthogonal experts: what they read (`A`), or what they add to a token (`outputs`).

`A`: the squared entries of A_i A_j^T, summed over pairs of routed experts and over all banks: 0
when the experts read orthogonal directions, r * E * (E - 1) / 2 per bank when they are all the same
r orthonormal ones. `outputs`: the squared cosine of the outputs of two experts that a token uses,
averaged over such pairs: 0 when orthogonal, 1 when parallel. Neither looks at how often an expert
is used, except that a token with a single expert has no pair.

Letters: T tokens, D in, E experts, r rank of one expert, R = E * r.

Source: `A`: Wang et al. 2023 (O-LoRA), https://arxiv.org/abs/2310.14152, between experts
instead of between tasks: it has a gradient even while B is zero. `outputs`: the aim of Feng et al.
2025 (OMoE), https://arxiv.org/abs/2501.10062, as a penalty instead of its Gram-Schmidt step; a pair
with (nearly) no output counts as orthogonal, so it starts to act when B has grown.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from moeadapt import stats
from moeadapt.balance.base import BalanceConfig, Mixture, check_low_rank
from moeadapt.experts import ExpertBank
from moeadapt.routing import Routing


class OrthogonalConfig(BalanceConfig):
    """Squared overlap of pairs of experts; routed experts only, not the shared ones.

    Attributes:
        form: `A`: of the experts' A matrices, all banks; `outputs`: of their outputs for a token,
            on the first bank, in T * E * R numbers of memory.
    """

    form: Literal["A", "outputs"] = "A"

    @property
    def reads_hidden(self) -> bool:
        """See `BalanceConfig.reads_hidden`."""
        return self.form == "outputs"

    def check_experts(self, bank: ExpertBank) -> None:
        """See `BalanceConfig.check_experts`; each expert has an A (and a B) of the same rank."""
        check_low_rank("orthogonal", bank, _FACTORS[self.form])

    def loss(self, routing: Routing, mixture: Mixture) -> Float[Tensor, ""]:
        """See `BalanceConfig.loss`."""
        with torch.autocast(routing.logits.device.type, enabled=False):
            if self.form == "A":
                return torch.stack(
                    [_overlap(bank).to(routing.logits) for bank in mixture.banks]
                ).sum()
            return _output_overlap(routing, mixture).to(routing.logits)


def _overlap(bank: ExpertBank) -> Float[Tensor, ""]:
    """Sum of squares of A_i A_j^T over i < j."""
    size, weight = bank.size, bank.factor("lora_A").weight
    a_RD = weight[: size.num_experts * size.rank].to(
        torch.promote_types(weight.dtype, torch.float32)
    )
    square_RR = (a_RD @ a_RD.T).square()
    pair_EE = square_RR.unflatten(0, (size.num_experts, size.rank)).sum(1)
    pair_EE = pair_EE.unflatten(1, (size.num_experts, size.rank)).sum(2)
    return pair_EE.triu(1).sum()


def _output_overlap(routing: Routing, mixture: Mixture) -> Float[Tensor, ""]:
    """Mean squared cosine of B_i A_i x and B_j A_j x over the pairs i < j that a token uses.

    <B_i h_i, B_j h_j> = h_i^T (B_i^T B_j) h_j, so no output is ever made.
    """
    bank = mixture.banks[0]
    experts, rank = bank.size.num_experts, bank.size.rank
    x_TD = mixture.hidden.to(torch.promote_types(mixture.hidden.dtype, torch.float32))
    if routing.token_mask is not None:
        x_TD = torch.where(routing.token_mask.unsqueeze(-1), x_TD, torch.zeros_like(x_TD))
    # Every weight 1: what reaches B, whatever an expert type does on the way.
    h_TR = bank.gate(bank.down(x_TD), None)[:, : experts * rank]
    # A cosine does not depend on the size of h, which could overflow when squared twice.
    h_TEr = F.normalize(h_TR.unflatten(-1, (experts, rank)), dim=-1)
    # Through the leaf's own forward, which is what gathers a sharded matrix.
    units_RR = torch.eye(bank.size.total_experts * rank, dtype=h_TR.dtype, device=h_TR.device)
    b_RO = bank.factor("lora_B")(units_RR)[: experts * rank]
    gram_ErR = (b_RO @ b_RO.T).unflatten(0, (experts, rank))
    half_ETR = h_TEr.transpose(0, 1) @ gram_ErR
    dot_TEE = (half_ETR.unflatten(-1, (experts, rank)) * h_TEr).sum(-1).transpose(0, 1)
    size_TE = dot_TEE.diagonal(dim1=1, dim2=2)
    product_TEE = size_TE.unsqueeze(1) * size_TE.unsqueeze(2)
    cosine2_TEE = dot_TEE.square() / (product_TEE + _FLOOR)
    used_TE = routing.expert_weights.detach() != 0
    pair_TEE = (used_TE.unsqueeze(1) & used_TE.unsqueeze(2)).triu(1).to(h_TR.dtype)
    pairs = stats.token_sum(pair_TEE, routing).sum()
    return stats.token_sum(cosine2_TEE * pair_TEE, routing).sum() / pairs.clamp(min=1)


_FACTORS = {"A": ("lora_A",), "outputs": ("lora_A", "lora_B")}
# Added to |B_i h_i|^2 |B_j h_j|^2 for unit h: bounds the gradient while B is still close to zero.
_FLOOR = 1e-12
