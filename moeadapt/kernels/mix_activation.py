"""The activations of an FFN whose experts span it, mixed: one kernel forward, one backward.

What autograd would keep per slot is computed again in backward, so only the base outputs stay in
memory: 2 T*F, whatever K. Kernels do what is elementwise in T x F; products over T or F are left to
`torch.mm`, on tensors of one chunk of tokens.

Letters: T tokens, C tokens of a chunk, F width of the FFN, K slots; G, U and R are the rank columns
of the gate, up and down projections, over all experts.

Source: the FFN mixture of MixLoRA, Li et al. 2024, https://arxiv.org/abs/2404.15159, eq. 3-6, where
each expert's FFN is computed in full; we differ in the order of the sums only.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from moeadapt.errors import UnsupportedError
from moeadapt.kernels import require
from moeadapt.kernels.reference import owned

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_SCRATCH = 2**26
"""Most elements of one scratch tensor [K, C, F]; also keeps offsets within 32 bits."""

_TILE = 128
"""Chunks are a multiple of it, so that every chunk starts at an aligned address."""


def mix_activation(
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
    *,
    chunk: int | None = None,
) -> tuple[Float[Tensor, "T F"], Float[Tensor, "T R"]]:
    """Return the mixed activation and what the down experts make of it, with gradients.

    Slot j of a token has `g_j = gate + (hidden_gate * on_j) @ b_gate.T`, `u_j` likewise, and the
    activation `a_j = silu(g_j) * u_j`, where `on_j` selects the rank columns of the slot's expert
    and of the shared experts. The results are `a_0 + sum_{j>=1} weights[j] * (a_j - a_0)` and
    `sum_j on_j * (weights[j] * a_j) @ a_down.T`, both in the type of `gate`.

    Args:
        gate: base output of the gate projection; bfloat16, float16 or float32.
        up: base output of the up projection.
        hidden_gate: rank-space input of the gate experts, times the scale of the LoRA. No columns
            if the gate projection has no experts; the same holds for up and down.
        hidden_up: rank-space input of the up experts.
        b_gate: second factor of the gate experts.
        b_up: second factor of the up experts.
        a_down: first factor of the down experts.
        weights: weight of each slot; they sum to one over K. Used as float32.
        experts: expert of each slot; -1 is the base FFN.
        owner_gate: expert that owns each rank column; -2 is a shared expert, on in every slot.
        owner_up: the same for up.
        owner_down: the same for down.
        chunk: most tokens computed at once, >= 1; None: what keeps scratch memory small.

    Raises:
        UnsupportedError: the kernels cannot run on the device or with the type of `gate`.
    """
    require(gate.device)
    if gate.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise UnsupportedError(
            f"the kernel of the FFN mixture computes in {known}, not in {gate.dtype}; leave out "
            "moeadapt.kernels.enabled() for this model"
        )
    ranked = (hidden_gate, hidden_up, b_gate, b_up, a_down)
    return _MixActivation.apply(
        gate.contiguous(),
        up.to(gate.dtype).contiguous(),
        *(t.to(gate.dtype).contiguous() for t in ranked),
        weights.float().contiguous(),
        *(t.int().contiguous() for t in (experts, owner_gate, owner_up, owner_down)),
        chunk,
    )


class _MixActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        from moeadapt.kernels import mix_activation_triton as kernels

        *tensors, chunk = args
        gate, a_down, weights = tensors[0], tensors[6], tensors[7]
        owner_down = tensors[11]
        (tokens, width), num_slots = gate.shape, weights.shape[0]
        mix, gated = torch.empty_like(gate), gate.new_empty(tokens, a_down.shape[0])
        size = _chunk_size(tokens, width * num_slots, chunk)
        scratch = gate.new_empty(size * width * num_slots)
        with torch.autocast(gate.device.type, enabled=False):
            for rows in _chunks(tokens, size):
                inputs = _inputs(tensors, rows)
                weighted = _slots(scratch, num_slots, mix[rows])
                kernels.forward(inputs, mix[rows], weighted)
                gated[rows] = _sum_owned(weighted @ a_down.T, owned(owner_down, inputs[8]))
        ctx.save_for_backward(*tensors)
        ctx.size = size
        return mix, gated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_mix: Tensor, d_gated: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        with torch.autocast(d_mix.device.type, enabled=False):
            grads = _gradients(tensors, d_mix.contiguous(), d_gated.contiguous(), ctx)
        return (*grads, *[None] * 5)


def _gradients(
    tensors: tuple[Tensor, ...], d_mix: Tensor, d_gated: Tensor, ctx: Any
) -> tuple[Tensor | None, ...]:
    from moeadapt.kernels import mix_activation_triton as kernels

    gate, up, hidden_gate, hidden_up, b_gate, b_up, a_down, weights = tensors[:8]
    owner_gate, owner_up, owner_down = tensors[9:]
    num_slots, (tokens, width) = weights.shape[0], gate.shape
    d_gate, d_up, d_weights = (torch.empty_like(t) for t in (gate, up, weights))
    d_hidden_gate, d_hidden_up = torch.empty_like(hidden_gate), torch.empty_like(hidden_up)
    needed = ctx.needs_input_grad[4:7]
    # Sums over the chunks, so float32; all three [F, rank].
    factors = [t.new_zeros(t.shape, dtype=torch.float32) for t in (b_gate, b_up, a_down.T)]
    scratch = [gate.new_empty(ctx.size * width * num_slots) for _ in range(3)]
    for rows in _chunks(tokens, ctx.size):
        inputs = _inputs(tensors, rows)
        slots = [_slots(buffer, num_slots, gate[rows]) for buffer in scratch]
        d_weights[:, rows] = kernels.backward(
            inputs,
            (a_down, owner_down),
            (d_mix[rows], d_gated[rows]),
            (d_gate[rows], d_up[rows]),
            (slots[0], slots[1], slots[2]),
        )
        on_gate, on_up, on_down = (owned(o, inputs[8]) for o in (owner_gate, owner_up, owner_down))
        d_hidden_gate[rows] = _sum_owned(slots[0] @ b_gate, on_gate)
        d_hidden_up[rows] = _sum_owned(slots[1] @ b_up, on_up)
        ranked = [(hidden_gate, on_gate), (hidden_up, on_up), (d_gated, on_down)]
        for i in range(3):
            if needed[i]:
                hidden, on = ranked[i]
                factors[i] += slots[i].flatten(0, 1).T @ _only_owned(hidden[rows], on)
    d_b_gate, d_b_up, d_a_down = (
        total.to(gate.dtype) if is_needed else None
        for total, is_needed in zip(factors, needed, strict=True)
    )
    if d_a_down is not None:
        d_a_down = d_a_down.T.contiguous()
    return d_gate, d_up, d_hidden_gate, d_hidden_up, d_b_gate, d_b_up, d_a_down, d_weights


def _chunk_size(tokens: int, per_token: int, chunk: int | None) -> int:
    """Return how many tokens are computed at once; a token takes `per_token` elements."""
    most = max(1, _SCRATCH // per_token // _TILE) * _TILE
    return min(tokens, most, chunk or most)


def _chunks(tokens: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size or 1))


def _inputs(tensors: tuple[Tensor, ...] | list[Tensor], rows: slice) -> tuple[Tensor, ...]:
    """Return what both kernels read of the tokens in `rows`, in the order they take it."""
    gate, up, hidden_gate, hidden_up, b_gate, b_up, _, weights = tensors[:8]
    experts, owner_gate, owner_up, _ = tensors[8:]
    return (
        *(t[rows] for t in (gate, up, hidden_gate, hidden_up)),
        *(b_gate, b_up, owner_gate, owner_up),
        *(t[:, rows].contiguous() for t in (experts, weights)),
    )


def _slots(buffer: Tensor, num_slots: int, like: Tensor) -> Float[Tensor, "K C F"]:
    """Return the scratch tensor of one chunk; the last chunk may be smaller."""
    return buffer[: num_slots * like.numel()].view(num_slots, *like.shape)


def _only_owned(hidden: Float[Tensor, "C R"], on: Tensor) -> Float[Tensor, "KC R"]:
    # where, not a product: a column that is off may hold what overflows.
    return torch.where(on, hidden, torch.zeros_like(hidden)).flatten(0, 1)


def _sum_owned(product: Float[Tensor, "K C R"], on: Tensor) -> Float[Tensor, "C R"]:
    return torch.where(on, product, torch.zeros_like(product)).sum(0)
