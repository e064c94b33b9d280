"""A linear map in float32 of bfloat16 tokens, which are read as they are and never cast.

A cast of the tokens to float32 writes and reads twice their bytes, multiplies slowly and is kept
for backward; a weight rounded to bfloat16 sends one token in 300 to other experts (D=4096, top-2).
Here the weight is written as the sum of two bfloat16 matrices, `high` and `low`: 16 significant
bits. Products of bfloat16 numbers are exact in float32, so one GEMM of twice as many columns that
adds up in float32 gives the logits of the float32 weight, to about 2.5e-6 of their size.

Letters: T tokens, D width of the tokens, W outputs, P = 2 * W.

Source: splitting a float32 matrix in bfloat16 parts: Henry, Tang and Heinecke 2019,
https://arxiv.org/abs/1904.06376, section III.
"""

from typing import Any

import torch
from jaxtyping import BFloat16, Float, Float32
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def float32_linear(
    x: Float[Tensor, "T D"], weight: Float[Tensor, "W D"], bias: Float[Tensor, " W"] | None = None
) -> Float[Tensor, "T W"]:
    """Return `x @ weight.T + bias` in float32 (float64 for float64 tokens), autocast off.

    Tokens in bfloat16 on CUDA are not cast, see above; the gradient of the weight is as precise as
    the output, that of `x` is bfloat16 as `x` is. Everywhere else `x` is cast first, and again in
    backward, so that what is kept is `x` itself:

    - on the CPU, which has no GEMM with bfloat16 inputs and a float32 output;
    - for float16: gradients carry the loss scale, so a cast to float16 before the multiplication
      can overflow or vanish, and scaling them token by token takes a further pass over [T, D];
    - for as few tokens as in generation: splitting the weight takes more kernels than the cast.
    """
    with torch.autocast(x.device.type, enabled=False):
        trains = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        if not reads_uncast(x, weight):
            wide = torch.promote_types(x.dtype, torch.float32)
            bias = None if bias is None else bias.to(wide)
            if trains and x.dtype != wide and not torch.compiler.is_compiling():
                out = _CastLinear.apply(x, weight.to(wide))
                return out if bias is None else out + bias
            return F.linear(x.to(wide), weight.to(wide), bias)
        weight = weight.float()
        # A Function costs time even where it records nothing.
        out = _Linear.apply(x, weight) if trains else _forward(x, split(weight))
        return out if bias is None else out + bias.float()


def reads_uncast(x: Float[Tensor, "T D"], weight: Float[Tensor, "W D"]) -> bool:
    """Whether `float32_linear` leaves `x` as it is."""
    return x.dtype == torch.bfloat16 and x.shape[0] > 2 * weight.shape[0] and has_product(x)


def has_product(x: Tensor) -> bool:
    """Whether the device of `x` has a GEMM of bfloat16 matrices with a float32 output."""
    return x.is_cuda and torch.version.hip is None


def product(a: BFloat16[Tensor, "M K"], b: BFloat16[Tensor, "K N"]) -> Float32[Tensor, "M N"]:
    """Return `a @ b`, added up and returned in float32; no gradient."""
    return torch.mm(a, b, out_dtype=torch.float32)


def split(matrix: Float32[Tensor, "M N"], dim: int = 0) -> BFloat16[Tensor, "..."]:
    """Return `high` and `low` along `dim`: their sum is `matrix` to 16 significant bits."""
    high = matrix.to(torch.bfloat16)
    low = (matrix - high).to(torch.bfloat16)
    return torch.cat([high, low], dim)


def _forward(x: BFloat16[Tensor, "T D"], parts: BFloat16[Tensor, "P D"]) -> Float32[Tensor, "T W"]:
    high, low = product(x, parts.t()).chunk(2, dim=1)
    return high + low


class _Linear(torch.autograd.Function):
    """`x @ weight.T` from the parts of the weight; keeps the parts and `x` itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        parts = split(weight)
        for_x, for_weight = ctx.needs_input_grad
        ctx.save_for_backward(x if for_weight else None, parts if for_x else None)
        return _forward(x, parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, parts = ctx.saved_tensors
        # Backward runs under whatever autocast its caller is in.
        with torch.autocast(grads[0].device.type, enabled=False):
            rows = split(grads[0], 1)
            width = rows.shape[1] // 2
            grad_x = None if parts is None else rows[:, :width] @ parts[:width]
            if x is None:
                return grad_x, None
            high, low = product(rows.t(), x).chunk(2, dim=0)
            return grad_x, high + low


class _CastLinear(torch.autograd.Function):
    """`x.float() @ weight.T`; keeps `x` as it is, half the bytes of its cast and nobody's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        for_x, for_weight = ctx.needs_input_grad
        ctx.save_for_backward(x if for_weight else None, weight if for_x else None)
        ctx.dtype = x.dtype
        return F.linear(x.to(weight.dtype), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        (grad,) = grads
        with torch.autocast(grad.device.type, enabled=False):
            grad_x = None if weight is None else (grad @ weight).to(ctx.dtype)
            grad_weight = None if x is None else grad.t() @ x.to(grad.dtype)
        return grad_x, grad_weight
