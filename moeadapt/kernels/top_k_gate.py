"""From logits to routing weights and the counts of the experts: one kernel each way.

Letters: T tokens, E experts.

Source: see `moeadapt.routers.top_k`.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from moeadapt.errors import UnsupportedError
from moeadapt.kernels import require

MOST_EXPERTS = 64
"""A program holds all experts of its tokens in registers."""


def top_k_gate(
    logits: Float[Tensor, "T E"],
    k: int,
    mask: Bool[Tensor, " T"] | None = None,
    *,
    renorm: bool = True,
) -> tuple[Float[Tensor, "T E"], Float[Tensor, "T E"], Float[Tensor, " E"], Float[Tensor, " E"]]:
    """Return weights, probs, how often each expert is used, and the sum of its probs.

    Each token uses its `k` most probable experts, the lower index among equals; the other weights
    are exactly 0. The counts are over real tokens, the same in every run; the uses have no
    gradient, everything else has.

    Args:
        logits: scores before the softmax, float32.
        k: experts per token, >= 1.
        mask: False for padding, which is routed but not counted; None: all tokens are real.
        renorm: divide the chosen probabilities by their sum.

    Raises:
        UnsupportedError: the kernels cannot run on the device, the logits are not float32, or
            there are more than 64 experts.
    """
    require(logits.device)
    if logits.dtype != torch.float32 or logits.shape[1] > MOST_EXPERTS:
        raise UnsupportedError(
            f"the kernel of the top-k gate takes float32 logits of up to {MOST_EXPERTS} experts, "
            f"not {logits.dtype} of {logits.shape[1]}; leave out moeadapt.kernels.enabled() for "
            "this model"
        )
    return _TopKGate.apply(logits.contiguous(), k, mask, renorm)


class _TopKGate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, k: int, mask: Tensor | None, renorm: bool
    ) -> tuple[Tensor, ...]:
        from moeadapt.kernels import top_k_gate_triton as kernels

        mask = None if mask is None else mask.contiguous()
        weights, probs, counts = kernels.forward(logits, k, mask, renorm)
        uses, sums = counts.clone().unbind(0)
        ctx.save_for_backward(weights, probs, mask)
        ctx.renorm = renorm
        ctx.mark_non_differentiable(uses)
        return weights, probs, uses, sums

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_weights: Tensor, d_probs: Tensor, d_uses: Tensor, d_sums: Tensor
    ) -> tuple[Tensor | None, ...]:
        from moeadapt.kernels import top_k_gate_triton as kernels

        d_outputs = tuple(grad.contiguous() for grad in (d_weights, d_probs, d_sums))
        return kernels.backward(ctx.saved_tensors, d_outputs, ctx.renorm), None, None, None
