"""Small values for the tests of the core: double precision and sizes that share no factor.

Letters: T tokens, D in, OUT out, E experts, R rank of one expert.
"""

from typing import Any

import torch
from torch import Tensor, nn

from moeadapt.balance import Mixture
from moeadapt.experts import EXPERTS, BankSize, ExpertBank
from moeadapt.experts.base import Init
from moeadapt.routers import ROUTERS, Router
from moeadapt.routing import Routing, TokenContext

T, D, OUT, E, R = 7, 8, 5, 4, 3


def context(tokens: int = T, mask: Tensor | None = None) -> TokenContext:
    """Return everything a router may ask for: one sequence, token ids that differ."""
    return TokenContext(
        mask=mask,
        sequences=torch.zeros(tokens, dtype=torch.int64),
        token_ids=torch.arange(tokens),
    )


ALL_REAL = context()


def hidden(tokens: int = T, dim: int = D) -> Tensor:
    """Return random hidden states."""
    return torch.randn(tokens, dim, dtype=torch.float64)


def make_router(spec: Any, dim: int = D, num_experts: int = E) -> Router:
    """Build a router in double precision whose scores are far apart."""
    router = ROUTERS.parse(spec).build(dim, num_experts).double()
    for parameter in router.parameters():
        nn.init.normal_(parameter)
    return router


def factors_of(bank: ExpertBank) -> list[nn.Parameter]:
    """Return every tensor of `bank`."""
    return [bank.factor(name).weight for name in bank.factor_names]


def make_bank(
    spec: Any,
    in_features: int = D,
    out_features: int = OUT,
    *,
    num_experts: int = E,
    num_shared: int = 0,
    init: Init = "random",
) -> ExpertBank:
    """Build a bank in double precision, with no zero factor unless `init` makes one."""
    size = BankSize(
        in_features=in_features,
        out_features=out_features,
        num_experts=num_experts,
        num_shared=num_shared,
        rank=R,
        scale=1.7,
    )
    bank = EXPERTS.parse(spec).build(size, init=init)
    for name in bank.factor_names:
        bank.factor(name).double()
    return bank


def routing_of(
    logits: Tensor, weights: Tensor, max_active: int, mask: Tensor | None = None
) -> Routing:
    """Build a routing with softmax probabilities."""
    return Routing(
        logits=logits,
        probs=logits.softmax(-1),
        weights=weights,
        max_active=max_active,
        token_mask=mask,
    )


def balanced(k: int, num_experts: int = E) -> Routing:
    """Token t uses the experts t, t+1, ..., t+k-1: every expert is used equally often."""
    start = torch.arange(num_experts)
    chosen = (torch.arange(num_experts) - start[:, None]) % num_experts < k
    logits = chosen.double()
    return routing_of(logits, chosen.double() / k, k)


def collapsed(k: int = 1, num_experts: int = E, tokens: int = T, logit: float = 60.0) -> Routing:
    """Every token uses the first k experts, the first one with all the probability."""
    logits = torch.zeros(tokens, num_experts, dtype=torch.float64)
    logits[:, 0] = logit
    weights = torch.zeros_like(logits)
    weights[:, :k] = 1 / k
    return routing_of(logits, weights, k)


def mixture_of(router: Any = "top_k", bank: Any = "lora") -> Mixture:
    """Return what a loss may look at besides a routing."""
    return Mixture(router=make_router(router), banks=[make_bank(bank)], hidden=hidden())
