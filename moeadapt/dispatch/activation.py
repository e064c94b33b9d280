"""The middle of a gated FFN with experts, keeping two tensors for backward instead of ten.

Between the base projections, of each slot of each token: `a = act(gate) * up`, and the first half
of the down experts. Autograd keeps every slot's intermediate results; here they are computed
again in backward, a few tokens at a time, from the two base outputs and what lies on the rank axis.

Letters: T tokens, C tokens of a chunk, F width of the FFN, K slots, R width of a rank axis.

Source: the mixture: Li et al. 2024 (MixLoRA), https://arxiv.org/abs/2404.15159, eq. 3-6; computing
the activation again instead of keeping it: Chen et al. 2016, https://arxiv.org/abs/1604.06174.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moeadapt import kernels
from moeadapt.dispatch.slot_rows import Columns, MaskedRows, SlotRows, SortedRows
from moeadapt.kernels.mix_activation import mix_activation as mix_activation_kernel
from moeadapt.kernels.reference import owned

Activation = Callable[[Tensor], Tensor]


class Expansion(NamedTuple):
    """The second half of the experts of one input projection.

    Attributes:
        hidden: on the rank axis, times the scale.
        matrix: lora_B.
        columns: the experts of the rank axis.
    """

    hidden: Float[Tensor, "T R"]
    matrix: Float[Tensor, "F R"]
    columns: Columns


class Contraction(NamedTuple):
    """The first half of the experts of the output projection.

    Attributes:
        matrix: lora_A.
        columns: the experts of the rank axis.
    """

    matrix: Float[Tensor, "Q F"]
    columns: Columns


def mix_activation(
    base: tuple[Float[Tensor, "T F"], Float[Tensor, "T F"]],
    experts: tuple[Expansion, Expansion],
    down: Contraction,
    slots: tuple[Int[Tensor, "K T"], Float[Tensor, "K T"]],
    activation: Activation,
    *,
    chunk: int | None = None,
    rows: type[MaskedRows] | type[SortedRows] | None = None,
) -> tuple[Float[Tensor, "T F"], Float[Tensor, "T Q"]]:
    """Return `sum_k w_k a_k`, and `sum_k w_k (A a_k)` on the rank axis of the down experts.

    With `a_k = act(gate + B (h * m_k)) * (up + B' (h' * m'_k))`, where m_k is 1 on the ranks of
    slot k's expert. The first sum is written as `a_0` plus weighted differences: where the experts
    change nothing it is, bit by bit, what the base FFN computes.

    The weights of a token must sum to one (those of `Slots` do): of the gradients that agree along
    all such weights, the one returned is that of the plain sum.

    Args:
        base: outputs of the base gate and up projections.
        experts: what is added to each.
        down: the first half of the down experts, not scaled.
        slots: expert (-1: none) and weight of each slot.
        activation: elementwise.
        chunk: tokens at a time; None: what suits the device.
        rows: how each token meets its expert; None: what suits the device.

    Raises:
        UnsupportedError: the Triton kernel was asked for, and cannot compute this.
    """
    ids, weights = slots
    gate, up = experts
    if _is_silu(activation) and kernels.use("mix_activation", base[0]):
        return _by_kernel(base, experts, down, slots)
    tensors = (*base, gate.hidden, up.hidden, gate.matrix, up.matrix, down.matrix, weights)
    plan = _Plan(
        ids=ids,
        columns=(gate.columns, up.columns, down.columns),
        activation=activation,
        chunk=chunk or chunk_tokens(base[0]),
        rows=rows or rows_for(ids.device),
    )
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
        return _forward(plan, tensors)
    return _MixActivation.apply(plan, *tensors)


def mix_activation_reference(
    base: tuple[Float[Tensor, "T F"], Float[Tensor, "T F"]],
    experts: tuple[Expansion, Expansion],
    down: Contraction,
    slots: tuple[Int[Tensor, "K T"], Float[Tensor, "K T"]],
    activation: Activation,
) -> tuple[Float[Tensor, "T F"], Float[Tensor, "T Q"]]:
    """Define `mix_activation`: one slot after the other, everything kept."""
    mixed, hidden = torch.zeros_like(base[0]), base[0].new_zeros(())
    for ids, weight in zip(*slots, strict=True):
        gate, up = (
            onto + (part.hidden * owned(part.columns.owner, ids)) @ part.matrix.T
            for onto, part in zip(base, experts, strict=True)
        )
        each = weight.unsqueeze(-1).to(gate.dtype) * activation(gate) * up
        mixed = mixed + each
        hidden = hidden + (each @ down.matrix.T) * owned(down.columns.owner, ids)
    return mixed, hidden


def chunk_tokens(like: Float[Tensor, "T F"]) -> int:
    """Return how many tokens at a time: a few buffers of them fit the cache of a CPU.

    On a GPU there is no such cache, and each chunk costs launches.
    """
    elements = 2**25 if like.is_cuda else 3 * 2**19
    return max(16, elements // max(1, like.shape[-1]))


def rows_for(device: torch.device) -> type[MaskedRows] | type[SortedRows]:
    """Return how tokens meet their experts: a CPU has nothing to wait for when sizes are read."""
    return SortedRows if device.type == "cpu" else MaskedRows


def _by_kernel(
    base: tuple[Tensor, Tensor],
    experts: tuple[Expansion, Expansion],
    down: Contraction,
    slots: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    gate, up = experts
    ids, weights = slots
    owners = (gate.columns.owner, up.columns.owner, down.columns.owner)
    factors = (gate.hidden, up.hidden, gate.matrix, up.matrix, down.matrix)
    return mix_activation_kernel(*base, *factors, weights, ids, *owners)


class _Plan(NamedTuple):
    """What is not differentiated."""

    ids: Tensor
    columns: tuple[Columns, Columns, Columns]
    activation: Activation
    chunk: int
    rows: type[MaskedRows] | type[SortedRows]

    def chunks(self) -> Iterator[tuple[slice, list[SlotRows]]]:
        """Return the tokens of each chunk, and their rows in each slot."""
        for start in range(0, self.ids.shape[1], self.chunk):
            own = slice(start, start + self.chunk)
            yield own, [self.rows(ids[own], own) for ids in self.ids]


class _MixActivation(torch.autograd.Function):
    """Keeps the base outputs and the rank axis, and computes the slots again."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*tensors)
        ctx.plan = plan
        return _forward(plan, tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *_backward(ctx.plan, grads, ctx.saved_tensors))


def _forward(plan: _Plan, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    gate0, up0, gate_h, up_h, gate_b, up_b, down_a, weights = tensors
    of_gate, of_up, of_down = plan.columns
    mixed = torch.empty_like(gate0)
    hidden = gate0.new_zeros(gate0.shape[0], down_a.shape[0])
    weights = weights.to(gate0.dtype).unsqueeze(-1)
    for own, slots in plan.chunks():
        first = None
        for weight, rows in zip(weights[:, own], slots, strict=True):
            gate = rows.expand(gate0, rows.take(gate_h), gate_b, of_gate)
            up = rows.expand(up0, rows.take(up_h), up_b, of_up)
            each = plan.activation(gate).mul_(up)
            hidden[own] += rows.restore(rows.contract(each, down_a.t(), of_down)) * weight
            each = rows.restore(each)
            if first is None:
                first = each
                mixed[own] = each
            else:
                mixed[own].addcmul_(each.sub_(first), weight)
    return mixed, hidden


def _backward(
    plan: _Plan, grads: tuple[Tensor, ...], tensors: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    gate0, up0, gate_h, up_h, gate_b, up_b, down_a, weights = tensors
    of_gate, of_up, of_down = plan.columns
    d_mixed, d_hidden = grads
    d_gate0, d_up0, d_weights = (torch.empty_like(t) for t in (gate0, up0, weights))
    d_gate_h, d_up_h = torch.zeros_like(gate_h), torch.zeros_like(up_h)
    # Summed over chunks and slots, so in more precision than half.
    wide = torch.promote_types(gate_b.dtype, torch.float32)
    d_gate_b, d_up_b, d_down_a = (
        t.new_zeros(t.shape, dtype=wide) for t in (gate_b, up_b, down_a.t())
    )
    for own, slots in plan.chunks():
        for k, rows in enumerate(slots):
            own_gate, own_up, own_down = (rows.take(t) for t in (gate_h, up_h, d_hidden))
            weight = rows.take(weights[k]).to(gate0.dtype).unsqueeze(-1)
            gate = rows.expand(gate0, own_gate, gate_b, of_gate)
            up = rows.expand(up0, own_up, up_b, of_up)
            active, slope = _with_slope(plan.activation, gate)
            d_each = rows.expand(d_mixed, own_down, down_a.t(), of_down)
            each = active * up
            rows.accumulate(d_down_a, each, own_down * weight, of_down)
            # What all slots have in common cancels in the router: not to be rounded to half.
            d_weights[k, own] = rows.restore(each.mul_(d_each).sum(-1, dtype=weights.dtype))
            del each
            d_each.mul_(weight)
            d_gate = slope(up.mul_(d_each))
            d_up = d_each.mul_(active)
            del gate, up, active
            d_gate_h[own] += rows.restore(rows.contract(d_gate, gate_b, of_gate))
            d_up_h[own] += rows.restore(rows.contract(d_up, up_b, of_up))
            rows.accumulate(d_gate_b, d_gate, own_gate, of_gate)
            rows.accumulate(d_up_b, d_up, own_up, of_up)
            for total, part in ((d_gate0, d_gate), (d_up0, d_up)):
                if k == 0:
                    total[own] = rows.restore(part)
                else:
                    total[own] += rows.restore(part)
    matrices = (d_gate_b.to(gate_b.dtype), d_up_b.to(up_b.dtype), d_down_a.t().to(down_a.dtype))
    return d_gate0, d_up0, d_gate_h, d_up_h, *matrices, d_weights


def _with_slope(activation: Activation, gate: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return `activation(gate)`, and what multiplies a gradient by its slope."""
    if _is_silu(activation):
        return F.silu(gate), lambda grad: torch.ops.aten.silu_backward(grad, gate)
    with torch.enable_grad():
        leaf = gate.detach().requires_grad_()
        active = activation(leaf.clone())  # it may work in place
    return active.detach(), lambda grad: torch.autograd.grad(active, leaf, grad)[0]


def _is_silu(activation: Activation) -> bool:
    return activation is F.silu or type(activation) is nn.SiLU
