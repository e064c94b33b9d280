"""LoRA experts of different ranks: delta_e(x) = scale * B_e A_e x, rank(e) = ranks[e].

Letters: T tokens, R width of the gated axis, the sum of all ranks, N routed and shared experts.

Source: Wang et al. 2024 (HMoE), https://arxiv.org/abs/2408.10681, section 3.1 (experts of different
sizes; there whole FFNs). The scale stays alpha / r of the adapter for all, so a rank counts the
same in every expert. Goes with the routers' option `cost_aware`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from moeadapt.errors import ConfigError
from moeadapt.experts.base import BankSize, ExpertConfig
from moeadapt.experts.lora import LoraBank, multiply


class HeterogeneousBank(LoraBank):
    """A LoRA bank whose experts own different numbers of rows; shared experts have rank r."""

    def costs(self) -> tuple[float, ...]:
        """See `ExpertBank.costs`: rank over the largest rank."""
        ranks = self.size.all_ranks[: self.size.num_experts]
        return tuple(rank / max(ranks) for rank in ranks)

    def gate(
        self, hidden: Float[Tensor, "*T R"], weights: Float[Tensor, "*T N"] | None
    ) -> Float[Tensor, "*T R"]:
        """See `ExpertBank.gate`."""
        if weights is None:
            return hidden * self.size.scale
        return multiply(hidden, _repeat(weights, self.size.all_ranks))


def _repeat(weights: Float[Tensor, "*T N"], ranks: Sequence[int]) -> Float[Tensor, "*T R"]:
    """Repeat the weight of each expert once per rank."""
    columns = weights.unbind(-1)
    # Not repeat_interleave, which reads the counts on the device.
    wide = [w.unsqueeze(-1).expand(*w.shape, r) for w, r in zip(columns, ranks, strict=True)]
    return torch.cat(wide, -1)


class HeterogeneousConfig(ExpertConfig):
    """LoRA experts whose ranks are listed.

    Attributes:
        ranks: rank of each routed expert, each >= 1, as many as there are experts; None: all have
            the adapter's `r`.
    """

    bank: ClassVar = HeterogeneousBank

    ranks: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] | None = None

    def sized(self, size: BankSize) -> BankSize:
        """See `ExpertConfig.sized`."""
        return size if self.ranks is None else replace(size, ranks=tuple(self.ranks))

    def check(self, size: BankSize) -> None:
        """See `ExpertConfig.check`."""
        if self.ranks is not None and len(self.ranks) != size.num_experts:
            raise ConfigError(
                f"experts 'heterogeneous': ranks={self.ranks} lists {len(self.ranks)} experts, but "
                f"there are {size.num_experts}; give one rank per expert"
            )
