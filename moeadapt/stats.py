"""What a routing says about itself: pure functions, real tokens only.

Letters: T tokens, E experts, W experts and null experts, L balance losses.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from moeadapt.routing import Routing


def token_count(routing: Routing) -> Float[Tensor, ""]:
    """Count the real tokens."""
    if routing.token_mask is None:
        return routing.probs.new_full((), routing.probs.shape[0])
    return routing.token_mask.sum().to(routing.probs.dtype)


def token_sum(values: Float[Tensor, "T ..."], routing: Routing) -> Float[Tensor, "..."]:
    """Sum over real tokens."""
    if routing.token_mask is None:
        return values.sum(0)
    mask = routing.token_mask.view(-1, *[1] * (values.dim() - 1))
    # where, not a product: a NaN computed for padding must not reach the sum.
    return torch.where(mask, values, torch.zeros_like(values)).sum(0)


def token_mean(values: Float[Tensor, "T ..."], routing: Routing) -> Float[Tensor, "..."]:
    """Mean over real tokens; 0 when every token is padding."""
    return token_sum(values, routing) / token_count(routing).clamp(min=1)


def active(routing: Routing) -> Float[Tensor, " T"]:
    """Experts in use per token, null experts left out."""
    return (routing.expert_weights != 0).to(routing.probs.dtype).sum(-1)


def importance(routing: Routing) -> Float[Tensor, " W"]:
    """Mean probability of each expert: sums to one, differentiable."""
    return token_mean(routing.probs, routing)


def load(routing: Routing) -> Float[Tensor, " W"]:
    """Share of the used slots that each expert gets: sums to one, not differentiable.

    Null experts are alike, so each is given their average.
    """
    used = token_sum((routing.weights.detach() != 0).to(routing.probs.dtype), routing)
    share = used / used.sum().clamp(min=1)
    if not routing.null_experts:
        return share
    own, null = share.split([routing.num_experts, routing.null_experts])
    return torch.cat([own, null.mean().expand_as(null)])


def entropy(routing: Routing) -> Float[Tensor, " T"]:
    """Entropy of each token's probabilities, in nats: 0 to log E."""
    return torch.special.entr(routing.probs).sum(-1)


@dataclass(frozen=True, kw_only=True)
class RouterStats:
    """One router over many forwards, averaged over its real tokens.

    Attributes:
        tokens: real tokens counted.
        load: share of the used slots per expert.
        importance: mean probability per expert.
        entropy: mean token entropy, in nats.
        active: mean experts in use per token.
        null_share: share of all slots, null ones included, that null experts took.
        losses: mean of each balance loss before its coefficient, in the order of `pack`.
    """

    tokens: float
    load: Float[Tensor, " E"]
    importance: Float[Tensor, " E"]
    entropy: float
    active: float
    losses: tuple[float, ...]
    null_share: float = 0.0


def packed_size(width: int, num_losses: int) -> int:
    """Length of the vector that `pack` returns; `width` counts experts and null experts."""
    return 3 + 2 * width + num_losses


def packed_uses(
    packed: Float[Tensor, " S"], num_losses: int
) -> tuple[Float[Tensor, ""], Float[Tensor, " W"]]:
    """Return the real tokens, and the uses of each expert, of a sum of `pack` vectors."""
    width = (len(packed) - packed_size(0, num_losses)) // 2
    return packed[1 + num_losses], packed[3 + num_losses :][:width]


def pack(routing: Routing, losses: Sequence[Float[Tensor, ""]]) -> Float[Tensor, " S"]:
    """Sums over real tokens as one float32 vector: vectors of many forwards add up.

    In this order: forwards, losses, tokens, entropy, uses of each expert, probability of each.
    """
    with torch.no_grad():
        probs = routing.probs
        used = (routing.weights != 0).to(probs.dtype)
        each = [probs.new_ones(probs.shape[0], 1), entropy(routing).unsqueeze(-1), used, probs]
        once = [probs.new_ones(()), *(loss.detach().to(probs.dtype) for loss in losses)]
        sums = token_sum(torch.cat(each, -1), routing)
        return torch.cat([torch.stack(once), sums]).float()


def unpack(packed: Float[Tensor, " S"], num_losses: int, null_experts: int = 0) -> RouterStats:
    """Turn a sum of `pack` vectors into averages."""
    values = packed.detach().double().cpu()
    width = (len(values) - packed_size(0, num_losses)) // 2
    sizes = [1, num_losses, 1, 1, width, width]
    forwards, losses, tokens, nats, used, probs = values.split(sizes)
    count = tokens.clamp(min=1)
    real = used[: width - null_experts]
    return RouterStats(
        tokens=float(tokens),
        load=real / real.sum().clamp(min=1),
        importance=probs[: width - null_experts] / count,
        entropy=float(nats / count),
        active=float(real.sum() / count),
        losses=tuple((losses / forwards.clamp(min=1)).tolist()),
        null_share=float(used[width - null_experts :].sum() / used.sum().clamp(min=1)),
    )
