"""A frozen sparse random A that also routes: only the k ranks with the largest |A x| are used.

Letters: T tokens, D in, O out, R width of the gated axis, F the routed part of it, N routed and
shared experts.

Source: Zou et al. 2025 (FlyLoRA), https://arxiv.org/abs/2510.08396, section 3: y = alpha / R
sum_{i in top-k |A x|} b_i a_i^T x, with as many nonzero entries in each row of A, drawn from
N(0, 1 / R^2), and density k / R. That is router `uniform` here: its weight 1 / E times our scale
alpha / r is alpha / R. Any other router multiplies its weights onto the ranks of its experts. We
differ: no load-balancing bias is added to A x before the choice.
"""

from typing import Annotated, ClassVar, Optional

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from moeadapt.errors import ConfigError, UnsupportedError
from moeadapt.experts.base import BankSize, ExpertConfig, Factor, Init, fill_b
from moeadapt.experts.lora import LoraBank
from moeadapt.routing import select_top_k


class RandomABank(LoraBank):
    """A LoRA bank with a frozen A, saved with the adapter; shared experts are always on."""

    frozen: ClassVar = ("lora_A",)
    inits: ClassVar = ("zero_b", "random")
    linear: ClassVar = False

    @property
    def owns_ranks(self) -> bool:
        """See `ExpertBank.owns_ranks`: which ranks count depends on the token."""
        return False

    @classmethod
    def make_factors(
        cls, size: BankSize, init: Init, config: Optional["ExpertConfig"] = None
    ) -> dict[str, Factor]:
        """See `ExpertBank.make_factors`."""
        settings = config if isinstance(config, RandomAConfig) else RandomAConfig()
        width = sum(size.all_ranks)
        a, b = Factor(size.in_features, width), Factor(width, size.out_features)
        share = settings.sparsity or min(1.0, settings.k / settings.ranks(size))
        entries = max(1, int(size.in_features * share))
        with torch.no_grad():
            columns = torch.rand_like(a.weight).topk(entries, -1).indices
            values = torch.randn_like(columns, dtype=a.weight.dtype) / settings.ranks(size)
            a.weight.scatter_(-1, columns, values)
        fill_b(b, init)
        return {"lora_A": a, "lora_B": b}

    @property
    def k(self) -> int:
        """Routed ranks per token."""
        return min(self.config.k if self.config else RandomAConfig().k, self._routed)

    @property
    def _routed(self) -> int:
        return self.size.num_experts * self.size.rank

    def chosen(self, hidden: Float[Tensor, "*T R"]) -> Bool[Tensor, "*T R"]:
        """Mark the ranks that count: the k largest of the routed ones, and all shared ones."""
        routed_F = hidden[..., : self._routed].detach().abs()
        marked_F = select_top_k(routed_F.reshape(-1, self._routed), self.k).view_as(routed_F)
        return F.pad(marked_F, (0, hidden.shape[-1] - self._routed), value=True)

    def gate(
        self, hidden: Float[Tensor, "*T R"], weights: Float[Tensor, "*T N"] | None
    ) -> Float[Tensor, "*T R"]:
        """See `ExpertBank.gate`."""
        return super().gate(hidden.masked_fill(~self.chosen(hidden), 0.0), weights)

    def apply_one(
        self, x: Float[Tensor, "T D"], expert: int, onto: Float[Tensor, "T O"] | None = None
    ) -> Float[Tensor, "T O"]:
        """See `ExpertBank.apply_one`: those of the expert's ranks that the token uses."""
        hidden_TR = x @ self.factor("lora_A").weight.T.to(x.dtype)
        own = slice(expert * self.size.rank, (expert + 1) * self.size.rank)
        used_Tr = hidden_TR[:, own] * self.chosen(hidden_TR)[:, own]
        return self.size.scale * used_Tr @ self._pair(expert)[1].T.to(x.dtype)

    def delta_weight(self, expert: int) -> Float[Tensor, "O D"]:
        """Refuse: which ranks count depends on the token.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "an expert of type 'random_a' uses other ranks for other tokens and is no one matrix"
        )


class RandomAConfig(ExpertConfig):
    """Frozen sparse A, trained B, implicit routing of single ranks; see the paper for `uniform`.

    Attributes:
        k: ranks per token, 1 to the number of routed ranks, num_experts * r.
        sparsity: share of the entries of A that are not zero, in (0, 1]; None: k over the number
            of routed ranks.
    """

    bank: ClassVar = RandomABank

    k: Annotated[int, Field(ge=1)] = 8
    sparsity: Annotated[float, Field(gt=0.0, le=1.0)] | None = None

    def ranks(self, size: BankSize) -> int:
        """Count the routed ranks."""
        return size.num_experts * size.rank

    def check(self, size: BankSize) -> None:
        """See `ExpertConfig.check`."""
        if self.k > self.ranks(size):
            raise ConfigError(
                f"experts 'random_a': k={self.k} is larger than the {self.ranks(size)} ranks of "
                f"{size.num_experts} experts of rank {size.rank}; choose k in "
                f"1..{self.ranks(size)}"
            )
