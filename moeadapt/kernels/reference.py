"""What each kernel computes, in plain PyTorch with plain autograd.

Letters: T tokens, F width of the FFN, K slots, E experts; G, U and R are the rank columns of the
gate, up and down projections, over all experts.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from moeadapt.routing import select_top_k

SHARED = -2
"""Owner of a rank column of a shared expert: on in every slot."""

BASE = -1
"""Expert of a slot that is the base FFN."""


def owned(owner: Int[Tensor, " R"], experts: Int[Tensor, "*S T"]) -> Bool[Tensor, "*S T R"]:
    """Mark the rank columns that are on for each token: its expert's, and the shared ones."""
    return (owner == experts.unsqueeze(-1)) | (owner == SHARED)


def mix_activation_reference(
    gate: Float[Tensor, "T F"],
    up: Float[Tensor, "T F"],
    hidden_gate: Float[Tensor, "T G"],
    hidden_up: Float[Tensor, "T U"],
    b_gate: Float[Tensor, "F G"],
    b_up: Float[Tensor, "F U"],
    a_down: Float[Tensor, "R F"],
    weights: Float[Tensor, "K T"],
    experts: Int[Tensor, "K T"],
    owner_gate: Int[Tensor, " G"],
    owner_up: Int[Tensor, " U"],
    owner_down: Int[Tensor, " R"],
) -> tuple[Float[Tensor, "T F"], Float[Tensor, "T R"]]:
    """Define `mix_activation`, one slot after the other."""
    weights = weights.to(gate.dtype)
    first, mix, gated = gate, gate, hidden_gate.new_zeros(gate.shape[0], a_down.shape[0])
    for j, expert in enumerate(experts):
        on_gate, on_up, on_down = (owned(o, expert) for o in (owner_gate, owner_up, owner_down))
        g = gate + torch.where(on_gate, hidden_gate, 0.0).to(gate.dtype) @ b_gate.T.to(gate.dtype)
        u = up + torch.where(on_up, hidden_up, 0.0).to(up.dtype) @ b_up.T.to(up.dtype)
        activation = F.silu(g) * u
        weight = weights[j].unsqueeze(-1)
        if j == 0:
            first = mix = activation
        else:
            mix = mix + weight * (activation - first)
        product = (weight * activation) @ a_down.T.to(gate.dtype)
        gated = gated + torch.where(on_down, product, 0.0)
    return mix, gated.to(gate.dtype)


def top_k_gate_reference(
    logits: Float[Tensor, "T E"],
    k: int,
    mask: Bool[Tensor, " T"] | None = None,
    *,
    renorm: bool = True,
) -> tuple[Float[Tensor, "T E"], Float[Tensor, "T E"], Float[Tensor, " E"], Float[Tensor, " E"]]:
    """Define `top_k_gate`."""
    probs = logits.softmax(-1)
    weights = probs * select_top_k(logits, k)
    if renorm:
        weights = weights / weights.sum(-1, keepdim=True)
    uses = (weights.detach() != 0).to(probs.dtype)
    if mask is None:
        return weights, probs, uses.sum(0), probs.sum(0)
    real = mask.unsqueeze(-1)
    zeros = torch.zeros_like(probs)
    return (
        weights,
        probs,
        torch.where(real, uses, zeros).sum(0),
        torch.where(real, probs, zeros).sum(0),
    )
