"""`svd_segments`: experts that start from segments of the base weight.

Letters: T tokens, D in, O out, E experts, r rank of one expert, R = E*r.

Source: `svd_segments` is Fan et al. 2025 (GOAT), https://arxiv.org/abs/2502.16894, section 3: with
W = U S V^T cut into E segments of min(D, O) / E singular values, expert e starts from the r largest
of segment e, B_e = U S^1/2 / sqrt(s rho), A_e = S^1/2 V^T / sqrt(s rho), rho = 10, and the scale is
s = sqrt(3 eta D / r), eta = 1. The residual W_res = s/E sum_e B_e A_e is subtracted. We differ: the
base weight stays as it is, W_res is a frozen branch beside it. (The factor in front of
s sum_e B_e A_e is a setting of the authors' code, 1 by default; with 1/E, weights that are balanced
leave the model as it was.)
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from moeadapt.experts import BankSize, ExpertBank, Factor

START_NAMES = ("start_A", "start_B")
"""Frozen copies of the factors that `svd_segments` started from; saved with the adapter."""

_RHO = 10.0


def make_start(size: BankSize) -> dict[str, Factor]:
    """Allocate the frozen branch, zero."""
    width = size.num_experts * size.rank
    a, b = Factor(size.in_features, width), Factor(width, size.out_features)
    return dict(zip(START_NAMES, (a, b), strict=True))


def start_from_segments(
    base: nn.Module, backend: Any, bank: ExpertBank, start: Mapping[str, Factor]
) -> None:
    """Write the segments of the base weight into the routed experts and the frozen branch."""
    size = bank.size
    with gather_params_ctx(list(base.parameters())), torch.no_grad():
        weight = _base_weight(base, backend)
        if weight.is_meta:
            return
        a, b = segments(weight, size)
        width = a.shape[0]
        bank.factor("lora_A").weight[:width].copy_(a)
        bank.factor("lora_B").weight[:, :width].copy_(b)
        start["start_A"].weight.copy_(a)
        start["start_B"].weight.copy_(b)


def segments(
    weight: Float[Tensor, "O D"], size: BankSize
) -> tuple[Float[Tensor, "R D"], Float[Tensor, "O R"]]:
    """Return A and B of all experts, each from its own segment of the SVD of `weight`."""
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    length = len(s) // size.num_experts
    rows = [e * length + i for e in range(size.num_experts) for i in range(size.rank)]
    root = (s[rows] / (size.scale * _RHO)).sqrt()
    return root.unsqueeze(-1) * vh[rows], u[:, rows] * root


def subtract_start(
    out: Float[Tensor, "*T O"],
    x: Float[Tensor, "*T D"],
    size: BankSize,
    start: Mapping[str, nn.Module],
) -> Float[Tensor, "*T O"]:
    """Return the output of the base less its residual: `out - s/E start_B start_A x`."""
    hidden = start["start_A"](x) * (-size.scale / size.num_experts)
    return start["start_B"](hidden, out, False)


def _base_weight(base: nn.Module, backend: Any) -> Float[Tensor, "O D"]:
    weight: Any = base.weight if backend is None else backend.get_base_weight(base)
    weight = weight.detach()
    return weight.T if isinstance(base, Conv1D) else weight
