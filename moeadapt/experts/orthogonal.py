"""Gram-Schmidt of the experts' outputs, done on the routing weights.

With outputs v_e = B_e h_e, Gram-Schmidt gives u_e = v_e - sum_{j<e} <v_e,u_j> / <u_j,u_j> u_j, a
triangular recombination of the v. So sum_e w_e u_e is a plain mixture of the v with other weights,
and those need only the products <v_i,v_j> = h_i^T (B_i^T B_j) h_j: no [tokens, experts, out].

Letters: T tokens, E experts, r rank of one expert, R rows of B^T, F = E*r of them routed.

Source: Feng et al. 2025 (OMoE), https://arxiv.org/abs/2501.10062, section 3 (experts' outputs on
the Stiefel manifold by Gram-Schmidt). We differ: the paper's vectors are orthonormal; ours keep
their length, since vectors of length one would change the model before training starts, where
every output is zero. Experts without weight, and outputs that depend on earlier ones, take no part.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from moeadapt.experts.base import Factor


def gram(b: Factor, width: int, routed: int) -> Float[Tensor, "F F"]:
    """Return `B^T B` over the first `routed` ranks of B, up to a constant, at least float32."""
    weight = b.weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast(weight.device.type, enabled=False):
        # Through the leaf's own forward, which is what gathers a sharded matrix.
        rows_RO = b(torch.eye(width, dtype=dtype, device=weight.device))[:routed]
        rows_RO = rows_RO / _size(rows_RO, (-2, -1))
        return rows_RO @ rows_RO.T


def orthogonal_weights(
    hidden: Float[Tensor, "T E r"],
    weights: Float[Tensor, "T E"],
    products: Float[Tensor, "E r E r"],
) -> Float[Tensor, "T E"]:
    """Return weights w' with `sum_e w'_e v_e = sum_e w_e u_e`.

    Neither a factor common to all of `hidden` nor one common to `products` changes them.

    Args:
        hidden: h, before B.
        weights: w.
        products: B^T B.
    """
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, products.dtype), weights.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        active_TE = (weights != 0).to(dtype).unsqueeze(-1)
        # where, not a product: an output that overflowed must not reach the others.
        h = torch.where(active_TE != 0, hidden.to(dtype), active_TE.new_zeros(()))
        h = h / _size(h, (-2, -1))
        dots_TEE = torch.einsum("tir,irjs,tjs->tij", h, products.to(dtype), h)
        return _recombine(dots_TEE, weights)


def _recombine(
    dots_TEE: Float[Tensor, "T E E"], weights_TE: Float[Tensor, "T E"]
) -> Float[Tensor, "T E"]:
    num_experts = dots_TEE.shape[-1]
    least = 32 * num_experts * torch.finfo(dots_TEE.dtype).eps
    units = torch.eye(num_experts, dtype=dots_TEE.dtype, device=dots_TEE.device)
    mixed = torch.zeros_like(dots_TEE[:, 0])
    earlier = []
    for e in range(num_experts):
        # u_e in terms of v; modified Gram-Schmidt, which keeps small errors small.
        u_TE = units[e].expand_as(mixed)
        for other_TE, image_TE, inverse_T in earlier:
            share_T = (u_TE * image_TE).sum(-1) * inverse_T
            u_TE = u_TE - share_T.unsqueeze(-1) * other_TE
        image_TE = torch.einsum("tij,tj->ti", dots_TEE, u_TE)
        square_T = (u_TE * image_TE).sum(-1)
        usable_T = square_T > least * dots_TEE[:, e, e]
        ones_T = torch.ones_like(square_T)
        inverse_T = torch.where(usable_T, 1 / torch.where(usable_T, square_T, ones_T), 0 * ones_T)
        earlier.append((u_TE, image_TE, inverse_T))
        mixed = mixed + weights_TE[:, e : e + 1].to(mixed.dtype) * u_TE
    return mixed.to(weights_TE.dtype)


def _size(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return the largest number in `x`, for dividing by it; without gradient."""
    tiny = torch.finfo(x.dtype).tiny
    return x.detach().abs().amax(dims, keepdim=True).clamp(min=tiny)
