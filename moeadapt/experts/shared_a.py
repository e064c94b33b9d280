"""One A for all experts, a B for each: delta_e(x) = scale * B_e A x, and A x is computed once.

Letters: T tokens, D in, O out, N routed and shared experts, r rank of one expert, R = N*r.

Source: Tian et al. 2024 (HydraLoRA), https://arxiv.org/abs/2404.19245, section 3.2, eq. 2. Shared
experts have a B of their own beside the same A.
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


class SharedABank(ExpertBank):
    """A is [r, D] and B is [O, R]; the axis grows from r to R in the gate."""

    factor_names: ClassVar = ("lora_A", "lora_B")
    reads_with: ClassVar = "lora_A"

    @classmethod
    def make_factors(
        cls, size: BankSize, init: Init, config: Optional["ExpertConfig"] = None
    ) -> dict[str, Factor]:
        """See `ExpertBank.make_factors`."""
        a = Factor(size.in_features, size.rank)
        b = Factor(size.total_experts * size.rank, size.out_features)
        fill_a(a, init, size.rank)
        fill_b(b, init)
        return {"lora_A": a, "lora_B": b}

    def down(self, x: Float[Tensor, "*T D"]) -> Float[Tensor, "*T r"]:
        """See `ExpertBank.down`."""
        return self.apply("lora_A", x)

    def gate(
        self, hidden: Float[Tensor, "*T r"], weights: Float[Tensor, "*T N"] | None
    ) -> Float[Tensor, "*T R"]:
        """See `ExpertBank.gate`: each expert gets its copy of `A x`."""
        if weights is None:
            weights = hidden.new_full(
                (*hidden.shape[:-1], self.size.total_experts), self.size.scale
            )
        scaled = weights.unsqueeze(-1)
        return multiply(hidden.unsqueeze(-2), scaled).flatten(-2)

    def up(
        self, gated: Float[Tensor, "*T R"], onto: Float[Tensor, "*T O"] | None, inplace: bool
    ) -> Float[Tensor, "*T O"]:
        """See `ExpertBank.up`."""
        return self.apply("lora_B", gated, onto, inplace)

    def _b(self, expert: int) -> Float[Tensor, "O r"]:
        own = slice(expert * self.size.rank, (expert + 1) * self.size.rank)
        return self.factor("lora_B").weight[:, own]

    def apply_one(
        self, x: Float[Tensor, "T D"], expert: int, onto: Float[Tensor, "T O"] | None = None
    ) -> Float[Tensor, "T O"]:
        """See `ExpertBank.apply_one`."""
        a_rD = self.factor("lora_A").weight
        return self.size.scale * (x @ a_rD.T.to(x.dtype) @ self._b(expert).T.to(x.dtype))

    def delta_weight(self, expert: int) -> Float[Tensor, "O D"]:
        """See `ExpertBank.delta_weight`."""
        return self.size.scale * (self._b(expert) @ self.factor("lora_A").weight)


class SharedAConfig(ExpertConfig):
    """A [r, in] for all experts, B [out, r] for each."""

    bank: ClassVar = SharedABank
