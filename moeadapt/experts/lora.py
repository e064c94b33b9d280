"""One low-rank pair per expert: delta_e(x) = scale * B_e A_e x.

Letters: T tokens, D in, O out, E experts, R = experts * rank.

Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1; as experts: Zadouri et al.
2023 (MoLORA), https://arxiv.org/abs/2309.05444, section 2.2.
"""

import math
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moeadapt.experts.base import BankSize, ExpertBank, ExpertConfig, Factor, Init


class LoraBank(ExpertBank):
    """A is [R, D] and B is [O, R]: expert e owns rows and columns e*rank to (e+1)*rank."""

    factor_names: ClassVar = ("lora_A", "lora_B")

    @classmethod
    def make_factors(cls, size: BankSize, init: Init) -> dict[str, Factor]:
        """See `ExpertBank.make_factors`."""
        width = size.total_experts * size.rank
        a, b = Factor(size.in_features, width), Factor(width, size.out_features)
        if init == "gaussian":
            nn.init.normal_(a.weight, std=1 / size.rank)
        else:
            nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
        if init == "random":
            nn.init.normal_(b.weight, std=1 / math.sqrt(width))
        return {"lora_A": a, "lora_B": b}

    def down(self, x: Float[Tensor, "*T D"]) -> Float[Tensor, "*T R"]:
        """See `ExpertBank.down`."""
        return self.factor("lora_A")(x)

    def gate(
        self, hidden: Float[Tensor, "*T R"], weights: Float[Tensor, "*T N"] | None
    ) -> Float[Tensor, "*T R"]:
        """See `ExpertBank.gate`."""
        if weights is None:
            return hidden * self.size.scale
        scaled = (weights * self.size.scale).to(hidden.dtype).unsqueeze(-1)
        experts = hidden.unflatten(-1, (self.size.total_experts, self.size.rank))
        if hidden.dtype == torch.float16:
            # An expert that is not chosen may overflow, and inf * 0 is NaN.
            experts = experts.masked_fill(scaled == 0, 0.0)
        return (experts * scaled).flatten(-2)

    def up(
        self, gated: Float[Tensor, "*T R"], onto: Float[Tensor, "*T O"] | None, inplace: bool
    ) -> Float[Tensor, "*T O"]:
        """See `ExpertBank.up`."""
        return self.factor("lora_B")(gated, onto, inplace)

    def _pair(self, expert: int) -> tuple[Float[Tensor, "r D"], Float[Tensor, "O r"]]:
        own = slice(expert * self.size.rank, (expert + 1) * self.size.rank)
        return self.factor("lora_A").weight[own], self.factor("lora_B").weight[:, own]

    def apply_one(self, x: Float[Tensor, "T D"], expert: int) -> Float[Tensor, "T O"]:
        """See `ExpertBank.apply_one`."""
        a_rD, b_Or = self._pair(expert)
        return self.size.scale * (x @ a_rD.T.to(x.dtype) @ b_Or.T.to(x.dtype))

    def delta_weight(self, expert: int) -> Float[Tensor, "O D"]:
        """See `ExpertBank.delta_weight`."""
        a_rD, b_Or = self._pair(expert)
        return self.size.scale * (b_Or @ a_rD)


class LoraConfig(ExpertConfig):
    """LoRA experts; rank and alpha come from the adapter's own `r` and `lora_alpha`."""

    bank: ClassVar = LoraBank
