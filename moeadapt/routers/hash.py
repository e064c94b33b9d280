"""Hash routing: the experts of a token follow from its vocabulary id; nothing is learned.

Letters: T tokens, D width, E experts.

Source: Roller et al. 2021, https://arxiv.org/abs/2106.04426, section 3.1 ("random hash"). The hash
is the finaliser of splitmix64 (Steele et al. 2014), so no table of the vocabulary is stored.
"""

from typing import Annotated, ClassVar

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from moeadapt.routers.base import Router, RouterConfig, check_k
from moeadapt.routing import Routing, TokenContext


class HashConfig(RouterConfig):
    """Each token id has `k` experts of its own, used equally; a baseline that ignores the context.

    Attributes:
        k: experts per token, 1 to the number of experts.
        seed: of the hash, >= 0: another seed is another assignment.
    """

    k: Annotated[int, Field(ge=1)] = 1
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    def check(self, num_experts: int) -> None:
        """See `RouterConfig.check`."""
        check_k("hash", self.k, num_experts)

    def build(self, dim: int, num_experts: int) -> "HashRouter":
        """See `RouterConfig.build`."""
        self.check(num_experts)
        return HashRouter(self, num_experts)


class HashRouter(Router):
    """Expert (h(id) + j) mod E for j < k, weight 1/k."""

    needs: ClassVar = frozenset({"token_ids"})

    def __init__(self, config: HashConfig, num_experts: int) -> None:
        """Remember k and the seed."""
        super().__init__(num_experts, max_active=config.k, sums_to_one=True)
        self.config = config

    def forward(self, hidden: Float[Tensor, "T D"], tokens: TokenContext) -> Routing:
        """See `Router.forward`; the hidden states are not looked at."""
        assert tokens.token_ids is not None
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        first_T1 = (_mix(tokens.token_ids, self.config.seed) % self.num_experts).unsqueeze(-1)
        every_E = torch.arange(self.num_experts, device=hidden.device)
        distance_TE = (every_E - first_T1) % self.num_experts
        weights_TE = (distance_TE < self.config.k).to(dtype) / self.config.k
        return Routing(
            logits=torch.zeros_like(weights_TE),
            probs=weights_TE,
            weights=weights_TE,
            max_active=self.max_active,
            token_mask=tokens.mask,
        )


def _mix(ids: Int[Tensor, " T"], seed: int) -> Int[Tensor, " T"]:
    """Scatter ids over the 64-bit integers, as non-negative numbers."""
    x = ids.to(torch.int64) * _GOLDEN + seed
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return (x ^ _shift(x, 31)) & 0x7FFFFFFFFFFFFFFF


def _shift(x: Int[Tensor, " T"], bits: int) -> Int[Tensor, " T"]:
    """Shift right without copying the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


_GOLDEN, _FIRST, _SECOND = map(
    _signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
