"""Which form computes one linear: `concat`, `grouped` or `gather`.

`concat` costs as the ranks of all experts, `grouped` as those of the chosen ones plus sorting and
copying the tokens; `gather` reads only the chosen experts, but once per token. The limits below
were measured (`benchmarks/speed`); where nothing was measured, `concat` is used.

Letters: T tokens, D in, E experts, k experts per token, r rank of one expert, R = E * r.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from moeadapt.errors import UnsupportedError
from moeadapt.experts.base import ExpertBank

Form = Literal["concat", "grouped", "gather"]
Impl = Literal["auto", "concat", "grouped", "gather"]

# R at which `grouped` overtakes `concat` on a CPU, per expert of a token.
_CPU_LIMITS = {torch.float32: 56, torch.bfloat16: 150}
# Below this many tokens sorting costs more than it saves.
_FEWEST_TOKENS = 64
# Up to this many tokens, those of one decoding step, reading fewer weights is what counts.
_DECODED_TOKENS = 16
_ALIGNED_BYTES = 16


def choose(bank: ExpertBank, x: Float[Tensor, "T D"], max_active: int | None) -> Form:
    """Return the form for these experts and tokens, following `bank.impl`.

    Args:
        bank: the experts; its `impl` is `auto` or a form.
        x: the tokens.
        max_active: upper bound on the experts of one token; None: all of them.

    Raises:
        UnsupportedError: `bank.impl` names a form that cannot compute this.
    """
    if bank.impl == "concat":
        return "concat"
    k, size = max_active or bank.size.num_experts, bank.size
    if bank.impl != "auto":
        reason = _obstacle(bank, x, bank.impl)
        if reason is not None:
            raise UnsupportedError(f"impl={bank.impl!r} {reason}; use impl='concat' or 'auto'")
        return bank.impl if max_active is not None else "concat"
    ranks = size.num_experts * size.rank
    if k >= size.num_experts or torch.compiler.is_compiling():
        return "concat"
    if x.shape[0] <= _DECODED_TOKENS and not torch.is_grad_enabled():
        few = size.num_experts >= 32 and ranks >= 512 and x.shape[0] * k * 3 <= size.num_experts  # noqa: PLR2004
        return "gather" if few and _obstacle(bank, x, "gather") is None else "concat"
    limit = _CPU_LIMITS.get(x.dtype) if x.device.type == "cpu" else None
    if limit is None or ranks <= limit * k or x.shape[0] < _FEWEST_TOKENS:
        return "concat"
    return "grouped" if _obstacle(bank, x, "grouped") is None else "concat"


def _obstacle(bank: ExpertBank, x: Tensor, form: str) -> str | None:
    """Return why `form` cannot compute this, or None."""
    if not bank.stacked:
        return (
            "needs experts that own consecutive rows of lora_A and columns of lora_B, all of one "
            "rank, and are only added up: experts='lora' (without orthogonalize) or 'rank1'"
        )
    if not all(bank.factor(name).is_whole for name in bank.factor_names):
        return "needs lora_A and lora_B whole on this device, and they are sharded or wrapped"
    if form == "grouped" and x.dtype != torch.float64:
        step = _ALIGNED_BYTES // x.element_size()
        sizes = (bank.size.rank, bank.size.in_features, bank.size.out_features)
        if any(size % step for size in sizes):
            return f"needs rank and widths that are multiples of {step} in {x.dtype}, not {sizes}"
        if torch.compiler.is_compiling() and x.dtype != torch.bfloat16:
            return f"cannot be compiled in {x.dtype}, only in torch.bfloat16"
    return None
