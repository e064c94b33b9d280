"""Auxiliary losses by gradient injection; nothing else in the library knows how.

`attach` returns the routing weights unchanged. Because the weights lie on the way from the router
to the task loss, the backward of that node runs exactly once per forward that is really
back-propagated, whatever computes the task loss:

- no checkpointing: one node, one backward;
- non-reentrant checkpointing: the recomputed graph only refills saved tensors;
- reentrant checkpointing: the first forward runs without grad and makes no node, the recomputed
  one makes the only node;
- reference and old-policy passes run without grad and make no node.

Adding to `outputs.loss` instead is dropped by trainers that compute the loss from logits, and
collecting losses on the side gives no gradient under reentrant checkpointing.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class _Attach(torch.autograd.Function):
    """Identity on the weights; in backward `scale` flows into the loss and `stats` into a sink."""

    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, loss: Tensor, scale: Tensor, stats: Tensor, sink: Tensor
    ) -> Tensor:
        # Not among the saved tensors: autograd would refuse a scale that changed since.
        ctx.scale = scale
        ctx.save_for_backward(stats)
        ctx.loss_dtype = loss.dtype
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (stats,) = ctx.saved_tensors
        return grads[0], ctx.scale.to(ctx.loss_dtype), None, None, stats


def attach(
    weights: Float[Tensor, "T E"],
    loss: Float[Tensor, ""],
    *,
    scale: Float[Tensor, ""],
    stats: Float[Tensor, " S"],
    sink: Float[Tensor, " S"],
) -> Float[Tensor, "T E"]:
    """Return `weights`; back-propagating through them also back-propagates `scale * loss`.

    Args:
        weights: routing weights on their way to the experts.
        loss: the auxiliary loss of this router.
        scale: d(what `backward` is called on) / d(mean loss of this micro-batch), that is the
            fp16 loss scale divided by the gradient accumulation steps; read in backward.
        stats: numbers to count once per backward; detached.
        sink: a leaf tensor with `requires_grad`; `stats` is added to `sink.grad`, on the device
            and without a synchronisation.

    Example:
        >>> w = torch.tensor([[0.25, 0.75]], requires_grad=True)
        >>> sink = torch.zeros(1, requires_grad=True)
        >>> one = torch.ones(())
        >>> out = attach(w, w.square().sum(), scale=one, stats=torch.ones(1), sink=sink)
        >>> out.sum().backward()
        >>> w.grad.tolist(), sink.grad.tolist()  # 1 + 2w, counted once
        ([[1.5, 2.5]], [1.0])
    """
    return _Attach.apply(weights, loss, scale, stats.detach(), sink)
