"""An A for each expert, one B for all: delta_e(x) = scale * B A_e x.

Letters: T tokens, D in, O out, N routed and shared experts, r rank of one expert, R = N*r.

Source: the mirror image of Tian et al. 2024 (HydraLoRA), https://arxiv.org/abs/2404.19245, section
3.2: there B is the part of an expert and A is common.
"""

from typing import ClassVar, Optional

from jaxtyping import Float
from torch import Tensor

from moeadapt.experts.base import (
    BankSize,
    ExpertBank,
    ExpertConfig,
    Factor,
    Init,
    fill_a,
    fill_b,
)
from moeadapt.experts.lora import multiply


class SharedBBank(ExpertBank):
    """A is [R, D] and B is [O, r]; the gate adds the experts up, so the axis shrinks to r."""

    factor_names: ClassVar = ("lora_A", "lora_B")
    reads_with: ClassVar = "lora_A"

    @classmethod
    def make_factors(
        cls, size: BankSize, init: Init, config: Optional["ExpertConfig"] = None
    ) -> dict[str, Factor]:
        """See `ExpertBank.make_factors`."""
        a = Factor(size.in_features, size.total_experts * size.rank)
        b = Factor(size.rank, size.out_features)
        fill_a(a, init, size.rank)
        fill_b(b, init)
        return {"lora_A": a, "lora_B": b}

    def down(self, x: Float[Tensor, "*T D"]) -> Float[Tensor, "*T R"]:
        """See `ExpertBank.down`."""
        return self.apply("lora_A", x)

    def gate(
        self, hidden: Float[Tensor, "*T R"], weights: Float[Tensor, "*T N"] | None
    ) -> Float[Tensor, "*T r"]:
        """See `ExpertBank.gate`: the weighted sum over experts."""
        experts = hidden.unflatten(-1, (self.size.total_experts, self.size.rank))
        if weights is None:
            return experts.sum(-2) * self.size.scale
        scaled = weights.unsqueeze(-1)
        return multiply(experts, scaled).sum(-2)

    def up(
        self, gated: Float[Tensor, "*T r"], onto: Float[Tensor, "*T O"] | None, inplace: bool
    ) -> Float[Tensor, "*T O"]:
        """See `ExpertBank.up`."""
        return self.apply("lora_B", gated, onto, inplace)

    def _a(self, expert: int) -> Float[Tensor, "r D"]:
        own = slice(expert * self.size.rank, (expert + 1) * self.size.rank)
        return self.factor("lora_A").weight[own]

    def apply_one(
        self, x: Float[Tensor, "T D"], expert: int, onto: Float[Tensor, "T O"] | None = None
    ) -> Float[Tensor, "T O"]:
        """See `ExpertBank.apply_one`."""
        b_Or = self.factor("lora_B").weight
        return self.size.scale * (x @ self._a(expert).T.to(x.dtype) @ b_Or.T.to(x.dtype))

    def delta_weight(self, expert: int) -> Float[Tensor, "O D"]:
        """See `ExpertBank.delta_weight`."""
        return self.size.scale * (self.factor("lora_B").weight @ self._a(expert))


class SharedBConfig(ExpertConfig):
    """A [r, in] for each expert, B [out, r] for all."""

    bank: ClassVar = SharedBBank
