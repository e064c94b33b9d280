"""The two Triton kernels of `top_k_gate`: a program owns some tokens and all of their experts.

Letters: T tokens, E experts, N programs.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeadapt.kernels.tuning import power_of_two, tiles, tuned

_CONFIGS = [triton.Config({}, num_warps=warps) for warps in (1, 2, 4)]
_TILE = 512
"""Elements of a program's tile, not tuned: the counts are summed program by program."""


@tuned(_CONFIGS, {}, ["num_experts", "k"])
@triton.jit
@no_type_check
def _forward(
    logits_ptr, mask_ptr, weights_ptr, probs_ptr, counts_ptr, tokens, num_experts, k,
    HAS_MASK: tl.constexpr, RENORM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Write weights and probs [T, E], and per program the uses and sums of probs [N, 2, E]."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    t_mask = t < tokens
    e_mask = e < num_experts
    inside = t_mask[:, None] & e_mask[None, :]
    at = t[:, None] * num_experts + e[None, :]
    # Rows beyond the last are zeros, not -inf, whose softmax would be NaN.
    logits = tl.load(logits_ptr + at, mask=inside, other=0.0)
    logits = tl.where(e_mask[None, :], logits, float("-inf"))
    exp = tl.exp(logits - tl.max(logits, 1)[:, None])
    probs = exp / tl.sum(exp, 1)[:, None]
    free = inside
    for _ in range(k):
        # The lowest index among the largest logits that are still free; none left: BLOCK_E.
        best = tl.max(tl.where(free, logits, float("-inf")), 1)
        index = tl.min(tl.where(free & (logits == best[:, None]), e[None, :], BLOCK_E), 1)
        free = free & (e[None, :] != index[:, None])
    weights = tl.where(inside & (free == 0), probs, 0.0)
    if RENORM:
        total = tl.sum(weights, 1)
        weights = weights / tl.where(t_mask, total, 1.0)[:, None]
    tl.store(weights_ptr + at, weights, mask=inside)
    tl.store(probs_ptr + at, probs, mask=inside)
    real = t_mask
    if HAS_MASK:
        real = real & (tl.load(mask_ptr + t, mask=t_mask, other=0) != 0)
    uses = tl.sum(tl.where(real[:, None] & (weights != 0.0), 1.0, 0.0), 0)
    sums = tl.sum(tl.where(real[:, None], probs, 0.0), 0)
    counts = counts_ptr + tl.program_id(0) * 2 * num_experts + e
    tl.store(counts, uses, mask=e_mask)
    tl.store(counts + num_experts, sums, mask=e_mask)


@tuned(_CONFIGS, {}, ["num_experts"])
@triton.jit
@no_type_check
def _backward(
    weights_ptr, probs_ptr, mask_ptr, d_weights_ptr, d_probs_ptr, d_sums_ptr, d_logits_ptr, tokens,
    num_experts, HAS_MASK: tl.constexpr, RENORM: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the logits [T, E]."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    t_mask = t < tokens
    inside = t_mask[:, None] & (e < num_experts)[None, :]
    at = t[:, None] * num_experts + e[None, :]
    weights = tl.load(weights_ptr + at, mask=inside, other=0.0)
    probs = tl.load(probs_ptr + at, mask=inside, other=0.0)
    d_weights = tl.load(d_weights_ptr + at, mask=inside, other=0.0)
    d_probs = tl.load(d_probs_ptr + at, mask=inside, other=0.0)
    d_sums = tl.load(d_sums_ptr + e, mask=e < num_experts, other=0.0)
    real = t_mask
    if HAS_MASK:
        real = real & (tl.load(mask_ptr + t, mask=t_mask, other=0) != 0)
    d_probs += tl.where(real[:, None], d_sums[None, :], 0.0)
    d_logits = tl.zeros_like(probs)
    if RENORM:
        # Renormalised weights are the softmax of the chosen logits.
        d_logits = weights * (d_weights - tl.sum(weights * d_weights, 1)[:, None])
    else:
        d_probs += tl.where(weights != 0.0, d_weights, 0.0)
    d_logits += probs * (d_probs - tl.sum(probs * d_probs, 1)[:, None])
    tl.store(d_logits_ptr + at, d_logits, mask=inside)


def _sizes(num_experts: int) -> dict[str, int]:
    block = max(2, power_of_two(num_experts))
    return {"BLOCK_E": block, "BLOCK_T": _TILE // block}


def forward(
    logits: Tensor, k: int, mask: Tensor | None, renorm: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward kernel: weights and probs [T, E], uses and sums of probs [2, E]."""
    tokens, num_experts = logits.shape
    sizes = _sizes(num_experts)
    programs = tiles(tokens, sizes["BLOCK_T"])
    weights, probs = torch.empty_like(logits), torch.empty_like(logits)
    counts = logits.new_empty(programs, 2, num_experts)
    if programs:
        _forward[(programs,)](
            logits, logits if mask is None else mask, weights, probs, counts, tokens, num_experts,
            min(k, num_experts), HAS_MASK=mask is not None, RENORM=renorm, **sizes,
        )  # fmt: skip
    # A sum of partial sums in a fixed order: atomic additions would differ from run to run.
    return weights, probs, counts.sum(0)


def backward(
    saved: tuple[Tensor, Tensor, Tensor | None], d_outputs: tuple[Tensor, ...], renorm: bool
) -> Tensor:
    """Launch the backward kernel: the gradient of the logits [T, E].

    Args:
        saved: weights and probs [T, E], mask [T].
        d_outputs: gradients of weights and probs [T, E] and of the sums of probs [E].
        renorm: whether the weights were renormalised.
    """
    weights, probs, mask = saved
    (tokens, num_experts), sizes = weights.shape, _sizes(weights.shape[1])
    d_logits = torch.empty_like(weights)
    programs = tiles(tokens, sizes["BLOCK_T"])
    if programs:
        _backward[(programs,)](
            weights, probs, weights if mask is None else mask, *d_outputs, d_logits, tokens,
            num_experts, HAS_MASK=mask is not None, RENORM=renorm, **sizes,
        )  # fmt: skip
    return d_logits
