"""One low-rank pair per expert: delta_e(x) = scale * B_e A_e x.

Letters: T tokens, D in, O out, E experts, R width of the gated axis, the sum of all ranks, N
routed and shared experts.

Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1; as experts: Zadouri et al.
2023 (MoLORA), https://arxiv.org/abs/2309.05444, section 2.2. `orthogonalize`: Feng et al. 2025
(OMoE), https://arxiv.org/abs/2501.10062, section 3; we differ, see `moeadapt.experts.orthogonal`.
"""

from typing import ClassVar, Optional

import torch
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
from moeadapt.experts.orthogonal import gram, orthogonal_weights


class LoraBank(ExpertBank):
    """A is [R, D] and B is [O, R]: each expert owns as many consecutive rows and columns."""

    factor_names: ClassVar = ("lora_A", "lora_B")
    reads_with: ClassVar = "lora_A"

    @property
    def owns_ranks(self) -> bool:
        """See `ExpertBank.owns_ranks`."""
        return not getattr(self.config, "orthogonalize", False)

    @classmethod
    def make_factors(
        cls, size: BankSize, init: Init, config: Optional["ExpertConfig"] = None
    ) -> dict[str, Factor]:
        """See `ExpertBank.make_factors`."""
        width = sum(size.all_ranks)
        a, b = Factor(size.in_features, width), Factor(width, size.out_features)
        fill_a(a, init, size.rank)
        fill_b(b, init)
        return {"lora_A": a, "lora_B": b}

    def down(self, x: Float[Tensor, "*T D"]) -> Float[Tensor, "*T R"]:
        """See `ExpertBank.down`."""
        return self.apply("lora_A", x)

    def gate(
        self, hidden: Float[Tensor, "*T R"], weights: Float[Tensor, "*T N"] | None
    ) -> Float[Tensor, "*T R"]:
        """See `ExpertBank.gate`."""
        if weights is None:
            return hidden * self.size.scale
        if getattr(self.config, "orthogonalize", False):
            weights = self._orthogonalized(hidden, weights)
        scaled = weights.unsqueeze(-1)
        experts = hidden.unflatten(-1, (self.size.total_experts, self.size.rank))
        return multiply(experts, scaled).flatten(-2)

    def _orthogonalized(
        self, hidden: Float[Tensor, "T R"], weights: Float[Tensor, "T N"]
    ) -> Float[Tensor, "T N"]:
        """Return the weights whose plain mixture is that of the orthogonalised experts."""
        size = self.size
        routed = size.num_experts * size.rank
        own = hidden[:, :routed].unflatten(-1, (size.num_experts, size.rank))
        products = gram(self.factor("lora_B"), sum(size.all_ranks), routed)
        products = products.view(size.num_experts, size.rank, size.num_experts, size.rank)
        routed_weights, always = weights.split([size.num_experts, size.num_shared], -1)
        return torch.cat([orthogonal_weights(own, routed_weights, products), always], -1)

    def up(
        self, gated: Float[Tensor, "*T R"], onto: Float[Tensor, "*T O"] | None, inplace: bool
    ) -> Float[Tensor, "*T O"]:
        """See `ExpertBank.up`."""
        return self.apply("lora_B", gated, onto, inplace)

    def _pair(self, expert: int) -> tuple[Float[Tensor, "r D"], Float[Tensor, "O r"]]:
        start = sum(self.size.all_ranks[:expert])
        own = slice(start, start + self.size.all_ranks[expert])
        return self.factor("lora_A").weight[own], self.factor("lora_B").weight[:, own]

    def apply_one(
        self, x: Float[Tensor, "T D"], expert: int, onto: Float[Tensor, "T O"] | None = None
    ) -> Float[Tensor, "T O"]:
        """See `ExpertBank.apply_one`; with `orthogonalize`, what the expert says by itself."""
        a_rD, b_Or = self._pair(expert)
        return self.size.scale * (x @ a_rD.T.to(x.dtype) @ b_Or.T.to(x.dtype))

    def delta_weight(self, expert: int) -> Float[Tensor, "O D"]:
        """See `ExpertBank.delta_weight`."""
        a_rD, b_Or = self._pair(expert)
        return self.size.scale * (b_Or @ a_rD)


def multiply(hidden: Float[Tensor, "..."], weights: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return `hidden * weights`, zero where the weight is."""
    if hidden.dtype == torch.float16:
        # An expert that is not chosen may overflow, and inf * 0 is NaN. Only what is not finite is
        # masked: a weight may be 0 and have a gradient, as those of straight-through samples.
        hidden = hidden.masked_fill((weights == 0) & ~hidden.isfinite(), 0.0)
    return hidden * weights


class LoraConfig(ExpertConfig):
    """LoRA experts; rank and alpha come from the adapter's own `r` and `lora_alpha`.

    Attributes:
        orthogonalize: whether the outputs of each token's experts are made orthogonal to each
            other before they are mixed (OMoE), in the order of the experts.
    """

    bank: ClassVar = LoraBank

    orthogonalize: bool = False

    def refusal(self, placement: str) -> str | None:
        """See `ExpertConfig.refusal`."""
        if self.orthogonalize and placement == "ffn":
            return (
                "orthogonalize=True compares what the experts of a token add to one linear, but "
                "here each expert has an FFN of its own"
            )
        return super().refusal(placement)
