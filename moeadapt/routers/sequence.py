"""One decision per sequence, for any router that decides per token.

Letters: T tokens, D width.

Source: Kudugunta et al. 2021 (task-level mixtures), https://arxiv.org/abs/2110.03742, section 3.1:
routing by the average of a sequence's token representations.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from moeadapt.routers.base import Router
from moeadapt.routing import Routing, TokenContext


def route(router: Router, hidden: Float[Tensor, "T D"], tokens: TokenContext) -> Routing:
    """Route `hidden` by token or by sequence, as `router.per` says.

    The mean of a sequence is over its real tokens, whatever is packed or padded beside it; noise is
    drawn once for a sequence. In training the mean covers the whole sequence, so an early token
    is routed by what follows it; generation keeps the decision made for the prompt.
    """
    if router.per == "token":
        return router(hidden, tokens)
    assert tokens.sequences is not None
    pooled = mean_per_sequence(hidden, tokens)
    return router(pooled, TokenContext()).rows(tokens.sequences, tokens.mask)


def mean_per_sequence(hidden: Float[Tensor, "T D"], tokens: TokenContext) -> Float[Tensor, "T D"]:
    """Return the mean over real tokens of sequence s in row s; zero where there is none."""
    assert tokens.sequences is not None
    x = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    real = x.new_ones(x.shape[0], 1)
    if tokens.mask is not None:
        real = real * tokens.mask.unsqueeze(-1)
        x = torch.where(tokens.mask.unsqueeze(-1), x, torch.zeros_like(x))
    # As many rows as tokens: how many sequences there are is known to the device alone.
    total = torch.zeros_like(x).index_add(0, tokens.sequences, x)
    count = torch.zeros_like(real).index_add(0, tokens.sequences, real)
    return total / count.clamp(min=1)
