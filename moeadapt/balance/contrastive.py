"""Contrastive experts: features of one expert are close, features of different experts apart.

For a feature with P others of its own expert (cosine 1) and N of other experts (cosine c):
log(P + N exp((c - 1) / temperature)). So about log P when experts differ, log(P + N) when all
features are the same. How tokens are spread over experts matters only through P and N: log P at a
collapse onto one expert, where there is nothing to tell apart.

Letters: T tokens, D in, N sampled tokens, K slots of a token, M = N * K, r rank of one expert.

Source: Luo et al. 2024 (MoELoRA), https://arxiv.org/abs/2402.12851: InfoNCE with
outputs of the same expert as positives and of other experts as negatives; for several positives as
in Khosla et al. 2020, https://arxiv.org/abs/2004.11362, eq. 2. We compare the features A_e x of a
sample of tokens instead of all outputs, which are all zero while B is.
"""

from typing import Annotated

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from moeadapt.balance.base import BalanceConfig, Mixture, check_low_rank
from moeadapt.experts import ExpertBank
from moeadapt.routing import Routing


class ContrastiveConfig(BalanceConfig):
    """InfoNCE over the features of the slots in use, on the first bank.

    Attributes:
        samples: real tokens that are compared, evenly spread over the batch, >= 2; memory grows
            with (samples * experts per token)^2.
        temperature: what cosines are divided by, > 0.
    """

    samples: Annotated[int, Field(ge=2)] = 64
    temperature: Annotated[float, Field(gt=0.0)] = 0.07

    @property
    def reads_hidden(self) -> bool:
        """See `BalanceConfig.reads_hidden`."""
        return True

    def check_experts(self, bank: ExpertBank) -> None:
        """See `BalanceConfig.check_experts`; each expert has an A of the same rank."""
        check_low_rank("contrastive", bank, ("lora_A",))

    def loss(self, routing: Routing, mixture: Mixture) -> Float[Tensor, ""]:
        """See `BalanceConfig.loss`; 0 when no expert has two features."""
        bank = mixture.banks[0]
        index_N, real_N = _sample(routing, self.samples)
        experts_NK, weights_NK = routing.rows(index_N, None).slots()
        used_M = ((weights_NK.detach() != 0) & real_N.unsqueeze(-1)).flatten()
        x_ND = mixture.hidden[index_N]
        x_ND = x_ND.to(torch.promote_types(x_ND.dtype, torch.float32))
        # where, not a product: a NaN computed for padding must not reach the gradient.
        x_ND = torch.where(real_N.unsqueeze(-1), x_ND, torch.zeros_like(x_ND))
        with torch.autocast(x_ND.device.type, enabled=False):
            h_NEr = bank.down(x_ND).unflatten(-1, (bank.size.total_experts, bank.size.rank))
            own_NKr = h_NEr.gather(1, experts_NK.unsqueeze(-1).expand(-1, -1, bank.size.rank))
            z_Mr = F.normalize(own_NKr.flatten(0, 1), dim=-1)
            cosine_MM = z_Mr @ z_Mr.T
        value = info_nce(cosine_MM / self.temperature, experts_NK.flatten(), used_M)
        return value.to(routing.logits)


def _sample(routing: Routing, samples: int) -> tuple[Int[Tensor, " N"], Bool[Tensor, " N"]]:
    """Return `samples` tokens, evenly spread over the real ones, and which of them are real."""
    total = routing.logits.shape[0]
    size = min(samples, total)
    place_N = torch.arange(size, device=routing.logits.device)
    if routing.token_mask is None:
        return place_N * total // size, torch.ones_like(place_N, dtype=torch.bool)
    order_T = (~routing.token_mask).to(torch.uint8).argsort(stable=True)
    count = routing.token_mask.sum()
    return order_T[place_N * count.clamp(min=size) // size], place_N < count


def info_nce(
    scores: Float[Tensor, "M M"], labels: Int[Tensor, " M"], used: Bool[Tensor, " M"]
) -> Float[Tensor, ""]:
    """Mean over items of -log softmax(score of a positive), over its positives and all others."""
    itself_MM = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    other_MM = used & used.unsqueeze(1) & ~itself_MM
    positive_MM = (other_MM & (labels == labels.unsqueeze(1))).to(scores.dtype)
    lowest = torch.finfo(scores.dtype).min / 2  # finite, so that an item alone has a gradient of 0
    total_M = scores.masked_fill(~other_MM, lowest).logsumexp(-1)
    count_M = positive_MM.sum(-1)
    excess_M = ((total_M.unsqueeze(1) - scores) * positive_MM).sum(-1) / count_M.clamp(min=1)
    return excess_M.sum() / (count_M > 0).sum().clamp(min=1)
