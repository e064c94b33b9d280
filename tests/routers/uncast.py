"""Tokens in bfloat16 for `float32_linear`, and on the CPU the GEMM that it lacks.

Letters: T tokens, D width, W outputs.
"""

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moeadapt.routers import float32_linear
from moeadapt.routers.float32_linear import reads_uncast

T, D, W = 101, 48, 5
BF16 = torch.bfloat16
ROUNDING = 2.0**-9
"""Largest relative error of one rounding to bfloat16."""

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
autocasts = pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])


def simulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the CPU an exact GEMM; that of a GPU stays the real one."""
    real = float32_linear.product

    def product(a: Tensor, b: Tensor) -> Tensor:
        assert a.dtype == b.dtype == BF16
        return real(a, b) if a.is_cuda else a.float() @ b.float()

    monkeypatch.setattr(float32_linear, "product", product)
    monkeypatch.setattr(float32_linear, "has_product", lambda x: True)


def no_product(a: Tensor, b: Tensor) -> Tensor:
    """Return zeros in the GEMM's size and dtype; the simulated GEMM casts, this one does not."""
    return torch.zeros(a.shape[0], b.shape[1], dtype=torch.float32)


def tensors(device: str = "cpu", tokens: int = T, dim: int = D, rows: int = W) -> SimpleNamespace:
    """Return tokens in bfloat16, a weight, and a gradient of the output."""
    x = torch.randn(tokens, dim).to(device, BF16).requires_grad_()
    weight = (0.02 * torch.randn(rows, dim)).to(device).requires_grad_()
    upstream = torch.randn(tokens, rows).to(device)
    assert reads_uncast(x, weight)
    return SimpleNamespace(x=x, weight=weight, upstream=upstream)


def error(found: Tensor, expected: Tensor) -> float:
    """Return the size of the difference, relative."""
    return float((found.detach().double() - expected).norm() / expected.norm())


def around(autocast: torch.dtype | None, device: str) -> Any:
    """Return a context with this autocast, or with none."""
    return torch.autocast(device, autocast) if autocast else contextlib.nullcontext()
