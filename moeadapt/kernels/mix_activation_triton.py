"""The two Triton kernels of `mix_activation`, and their launch on one chunk of tokens.

A program owns a tile of tokens x FFN columns and walks over the slots, so the base outputs are read
once and each slot's gate, up and activation live in registers. All sums are float32.

Letters: C tokens of the chunk, F width of the FFN, K slots, N tiles along F; G, U and R are the
rank columns of the gate, up and down projections, over all experts.
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from moeadapt.kernels.reference import SHARED
from moeadapt.kernels.tuning import rank_block, tiles, tuned

BLOCK_F = 64
"""Tile width of the backward kernel, not tuned: the weights' gradient is summed tile by tile."""

_SHARED, _NOBODY = tl.constexpr(SHARED), tl.constexpr(-3)

_INTERPRETED = tl.constexpr("interpreted")
"""Precision of products in Triton's interpreter, which multiplies the bits of bfloat16 numbers."""

_CONFIGS_FORWARD = [
    triton.Config({"BLOCK_T": t, "BLOCK_F": f}, num_warps=warps, num_stages=stages)
    for t, f, warps, stages in ((64, 64, 8, 2), (64, 64, 8, 3), (64, 64, 4, 2), (128, 64, 8, 2))
]
_CONFIGS_BACKWARD = [
    triton.Config({"BLOCK_T": t}, num_warps=warps, num_stages=stages)
    for t, warps, stages in ((64, 8, 2), (64, 8, 3), (32, 8, 2))
]
_KEY = ["width", "RANK_G", "RANK_U", "SLOTS"]


@triton.jit
@no_type_check
def _plus_delta(
    tile, hidden_ptr, weight_ptr, owner_ptr, expert, t, t_mask, f, f_mask, stride_f, stride_r,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add `(hidden * owned) @ weight` to a tile; columns of other experts never meet a product."""
    for start in range(0, RANK, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        r_mask = r < RANK
        owner = tl.load(owner_ptr + r, mask=r_mask, other=_NOBODY)
        on = (owner[None, :] == expert[:, None]) | (owner[None, :] == _SHARED)
        at = hidden_ptr + t[:, None] * RANK + r[None, :]
        hidden = tl.load(at, mask=t_mask[:, None] & r_mask[None, :], other=0.0)
        hidden = tl.where(on, hidden, tl.zeros_like(hidden))
        at = weight_ptr + f[:, None] * stride_f + r[None, :] * stride_r
        weight = tl.load(at, mask=f_mask[:, None] & r_mask[None, :], other=0.0)
        if PRECISION == _INTERPRETED:
            tile = tl.dot(hidden.to(tl.float32), tl.trans(weight.to(tl.float32)), tile)
        else:
            tile = tl.dot(hidden, tl.trans(weight), tile, input_precision=PRECISION)
    return tile


@tuned(_CONFIGS_FORWARD, {"BLOCK_T": 16, "BLOCK_F": 32}, _KEY)
@triton.jit
@no_type_check
def _forward(
    gate_ptr, up_ptr, hidden_gate_ptr, hidden_up_ptr, b_gate_ptr, b_up_ptr, owner_gate_ptr,
    owner_up_ptr, experts_ptr, weights_ptr, mix_ptr, weighted_ptr, tokens, width,
    SLOTS: tl.constexpr, RANK_G: tl.constexpr, RANK_U: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_U: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Write the mixed activation [C, F] and each slot's weighted activation [K, C, F]."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    t_mask = t < tokens
    f_mask = f < width
    inside = t_mask[:, None] & f_mask[None, :]
    at = t[:, None] * width + f[None, :]
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    first = gate
    mix = gate
    for j in tl.static_range(SLOTS):
        expert = tl.load(experts_ptr + j * tokens + t, mask=t_mask, other=-1)
        weight = tl.load(weights_ptr + j * tokens + t, mask=t_mask, other=0.0)[:, None]
        g = _plus_delta(
            gate, hidden_gate_ptr, b_gate_ptr, owner_gate_ptr, expert, t, t_mask, f, f_mask,
            RANK_G, 1, RANK_G, BLOCK_G, PRECISION,
        )  # fmt: skip
        u = _plus_delta(
            up, hidden_up_ptr, b_up_ptr, owner_up_ptr, expert, t, t_mask, f, f_mask,
            RANK_U, 1, RANK_U, BLOCK_U, PRECISION,
        )  # fmt: skip
        activation = g * tl.sigmoid(g) * u
        if j == 0:
            first = activation
            mix = activation
        else:
            mix += weight * (activation - first)
        slot = weighted_ptr + j * tokens * width
        value = weight * activation
        tl.store(slot + at, value.to(weighted_ptr.dtype.element_ty), mask=inside)
    tl.store(mix_ptr + at, mix.to(mix_ptr.dtype.element_ty), mask=inside)


@tuned(_CONFIGS_BACKWARD, {"BLOCK_T": 16}, [*_KEY, "RANK_D"])
@triton.jit
@no_type_check
def _backward(
    gate_ptr, up_ptr, hidden_gate_ptr, hidden_up_ptr, b_gate_ptr, b_up_ptr, owner_gate_ptr,
    owner_up_ptr, experts_ptr, weights_ptr, a_down_ptr, owner_down_ptr, d_mix_ptr, d_gated_ptr,
    d_gate_ptr, d_up_ptr, slot_gate_ptr, slot_up_ptr, weighted_ptr, d_weights_ptr, tokens, width,
    SLOTS: tl.constexpr, RANK_G: tl.constexpr, RANK_U: tl.constexpr, RANK_D: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Write the gradients of gate and up [C, F], and per slot what matrix products need.

    Those are the gradients of the slot's own gate and up and its weighted activation [K, C, F];
    and the gradient of the weights, one partial sum per tile [K, N, C].
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    t_mask = t < tokens
    f_mask = f < width
    inside = t_mask[:, None] & f_mask[None, :]
    at = t[:, None] * width + f[None, :]
    d_mix = tl.load(d_mix_ptr + at, mask=inside, other=0.0).to(tl.float32)
    rest = tl.full([BLOCK_T], 1.0, tl.float32)
    for j in tl.static_range(1, SLOTS):
        rest -= tl.load(weights_ptr + j * tokens + t, mask=t_mask, other=0.0)
    first = d_mix
    d_gate = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
    d_up = tl.zeros([BLOCK_T, BLOCK_F], tl.float32)
    for j in tl.static_range(SLOTS):
        expert = tl.load(experts_ptr + j * tokens + t, mask=t_mask, other=-1)
        weight = tl.load(weights_ptr + j * tokens + t, mask=t_mask, other=0.0)
        g = _plus_delta(
            tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32),
            hidden_gate_ptr, b_gate_ptr, owner_gate_ptr, expert, t, t_mask, f, f_mask,
            RANK_G, 1, RANK_G, BLOCK_G, PRECISION,
        )  # fmt: skip
        u = _plus_delta(
            tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32),
            hidden_up_ptr, b_up_ptr, owner_up_ptr, expert, t, t_mask, f, f_mask,
            RANK_U, 1, RANK_U, BLOCK_U, PRECISION,
        )  # fmt: skip
        # Gradient of weight * activation, which the down experts read.
        d_weighted = _plus_delta(
            tl.zeros([BLOCK_T, BLOCK_F], tl.float32),
            d_gated_ptr, a_down_ptr, owner_down_ptr, expert, t, t_mask, f, f_mask,
            1, width, RANK_D, BLOCK_D, PRECISION,
        )  # fmt: skip
        sigmoid = tl.sigmoid(g)
        silu = g * sigmoid
        activation = silu * u
        d_weight = d_weighted * activation
        if j == 0:
            first = activation
            d_activation = rest[:, None] * d_mix + weight[:, None] * d_weighted
        else:
            d_weight += d_mix * (activation - first)
            d_activation = weight[:, None] * (d_mix + d_weighted)
        du = d_activation * silu
        dg = d_activation * u * (sigmoid + silu * (1.0 - sigmoid))
        d_gate += dg
        d_up += du
        slot = j * tokens * width + at
        dtype = weighted_ptr.dtype.element_ty
        tl.store(slot_gate_ptr + slot, dg.to(dtype), mask=inside)
        tl.store(slot_up_ptr + slot, du.to(dtype), mask=inside)
        tl.store(weighted_ptr + slot, (weight[:, None] * activation).to(dtype), mask=inside)
        # Outside the tile gate and up were read as zero, so the activation is zero there.
        partial = d_weights_ptr + (j * tl.num_programs(1) + tl.program_id(1)) * tokens + t
        tl.store(partial, tl.sum(d_weight, 1), mask=t_mask)
    tl.store(d_gate_ptr + at, d_gate.to(d_gate_ptr.dtype.element_ty), mask=inside)
    tl.store(d_up_ptr + at, d_up.to(d_up_ptr.dtype.element_ty), mask=inside)


def _precision(dtype: torch.dtype) -> str:
    """Return how products are computed: of float32 as torch would compute them."""
    if knobs.runtime.interpret:
        return _INTERPRETED.value
    exact = dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
    return "ieee" if exact else "tf32"


def _sizes(inputs: tuple[Tensor, ...]) -> dict[str, int | str]:
    gate, hidden_gate, hidden_up, experts = inputs[0], inputs[2], inputs[3], inputs[8]
    return {
        "SLOTS": experts.shape[0],
        "RANK_G": hidden_gate.shape[1],
        "RANK_U": hidden_up.shape[1],
        "BLOCK_G": rank_block(hidden_gate.shape[1]),
        "BLOCK_U": rank_block(hidden_up.shape[1]),
        "PRECISION": _precision(gate.dtype),
    }


def forward(inputs: tuple[Tensor, ...], mix: Tensor, weighted: Tensor) -> None:
    """Launch the forward kernel.

    Args:
        inputs: gate, up [C, F], hidden_gate [C, G], hidden_up [C, U], b_gate [F, G], b_up [F, U],
            owner_gate [G], owner_up [U], experts [K, C] int32, weights [K, C] float32; contiguous.
        mix: output [C, F].
        weighted: output [K, C, F].
    """
    tokens, width = mix.shape

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        return tiles(tokens, meta["BLOCK_T"]), tiles(width, meta["BLOCK_F"])

    _forward[grid](*inputs, mix, weighted, tokens, width, **_sizes(inputs))


def backward(
    inputs: tuple[Tensor, ...],
    down: tuple[Tensor, Tensor],
    d_outputs: tuple[Tensor, Tensor],
    d_base: tuple[Tensor, Tensor],
    slots: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """Launch the backward kernel and return the gradient of the weights [K, C].

    Args:
        inputs: see `forward`.
        down: a_down [R, F], owner_down [R].
        d_outputs: gradients of mix [C, F] and gated [C, R].
        d_base: outputs, gradients of gate and up [C, F].
        slots: outputs [K, C, F], gradients of each slot's gate and up; its weighted activation.
    """
    tokens, width = d_base[0].shape
    num_slots, across = slots[0].shape[0], tiles(width, BLOCK_F)
    d_weights = inputs[9].new_empty(num_slots, across, tokens)
    rank = down[0].shape[0]

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        return tiles(tokens, meta["BLOCK_T"]), across

    _backward[grid](
        *inputs, *down, *d_outputs, *d_base, *slots, d_weights, tokens, width,
        RANK_D=rank, BLOCK_D=rank_block(rank), BLOCK_F=BLOCK_F, **_sizes(inputs),
    )  # fmt: skip
    return d_weights.sum(1)
