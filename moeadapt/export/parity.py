"""Runs an adapter and its checkpoint on the same tokens, and refuses what no rounding explains.

Steps: 1. compare in the base's dtype, with every implementation of the experts; 2. where that is
float32 and the difference is above the tolerance, compare in float64: rounding goes away there,
and a mistake stays.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from moeadapt.errors import ExportError
from moeadapt.export import shards
from moeadapt.export.agreement import agreement, choices_of, watched
from moeadapt.export.mixture import Mixture
from moeadapt.export.receipt import GROSS, TOLERANCE, Measured, compare
from moeadapt.export.verify import load_strictly, logits_of
from moeadapt.tuner.inspect import collect_routing

IMPLEMENTATIONS = ("eager", "grouped_mm")
"""How transformers runs experts; both are compared. float64 runs `eager` alone."""

EXACT_BITS = 32
"""Floating point types of as many bits keep what was trained."""


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What was compared, and what is promised.

    Attributes:
        measured: implementation of the experts -> the comparison; empty: none was made.
        allowed: largest logit difference that was allowed; None: no promise.
        float64_difference: largest logit difference in float64, where it was needed.
    """

    measured: dict[str, Measured] = field(default_factory=dict)
    allowed: float | None = None
    float64_difference: float | None = None

    @property
    def worst(self) -> Measured | None:
        """The comparison with the largest difference."""
        return max(self.measured.values(), key=lambda m: m.max_logit_difference, default=None)


def check_parity(
    model: PeftModel,
    mixture: Mixture,
    folder: Path,
    ids: Sequence[Tensor],
    tensors: Sequence[shards.PlannedTensor],
    tolerance: float | None,
) -> Checked:
    """Compare adapter and checkpoint.

    Args:
        model: the adapter on its base, in eval mode.
        mixture: the same, as it was written.
        folder: the checkpoint.
        ids: texts as token ids.
        tensors: what is on disk.
        tolerance: largest allowed logit difference; None: see `moeadapt.export`.

    Raises:
        ExportError: the checkpoint does not load, is not finite, or is not the adapter.
    """
    base: Any = model.get_base_model()
    names = ("eager",) if base.dtype == torch.float64 else IMPLEMENTATIONS
    measured = _measure(model, mixture, folder, ids, base.dtype, names)
    for name, found in measured.items():
        if not math.isfinite(found.max_logit_difference):
            raise ExportError(
                f"the checkpoint gives NaN or infinite logits with the experts {name!r} in "
                f"{found.dtype}, or the adapter does; nothing was kept"
            )
    checked = Checked(measured=measured)
    worst = checked.worst
    assert worst is not None
    exact = all(torch.finfo(t.dtype).bits >= EXACT_BITS for t in tensors)
    if tolerance is not None or (exact and worst.dtype in ("float32", "float64")):
        allowed = worst.float32_tolerance if tolerance is None else tolerance
        checked = replace(checked, allowed=allowed)
        if worst.max_logit_difference <= allowed:
            return checked
        if tolerance is None and worst.dtype == "float32":
            return _in_float64(model, mixture, folder, ids, checked)
        raise _refusal(worst, f"allowed {allowed:.1e}")
    if worst.is_beyond_rounding:
        raise _refusal(worst, f"and the mean over {GROSS:.0%} of that, which is no rounding")
    return checked


def _in_float64(
    model: PeftModel, mixture: Mixture, folder: Path, ids: Sequence[Tensor], checked: Checked
) -> Checked:
    double: Any = copy.deepcopy(model).double()
    found = _measure(double, mixture, folder, ids, torch.float64, ("eager",))["eager"]
    if found.max_logit_difference > TOLERANCE:
        assert checked.worst is not None
        raise _refusal(checked.worst, f"and by {found.max_logit_difference:.1e} in float64")
    return replace(checked, float64_difference=found.max_logit_difference)


def _refusal(found: Measured, why: str) -> ExportError:
    return ExportError(
        f"the checkpoint is not the adapter: logits of up to {found.largest_logit:.1f} differ by "
        f"{found.max_logit_difference:.1e} in {found.dtype} (mean "
        f"{found.mean_logit_difference:.1e}, KL {found.kl:.1e}), {why}; nothing was kept. If that "
        "is the rounding you expect, set tolerance"
    )


def _measure(
    model: PeftModel,
    mixture: Mixture,
    folder: Path,
    ids: Sequence[Tensor],
    dtype: torch.dtype,
    implementations: Sequence[str],
) -> dict[str, Measured]:
    """Return the comparison of adapter and checkpoint, by implementation of the experts."""
    base: Any = model.get_base_model()
    device = base.device
    here = [text.to(device) for text in ids]
    with collect_routing(model) as routings:
        reference = [logits.cpu() for logits in logits_of(base, here)]
    ours = choices_of(routings, mixture.num_experts)
    found: Any = load_strictly(folder, dtype).to(device)
    measured = {}
    for implementation in implementations:
        found.set_experts_implementation(implementation)
        with watched(found, mixture.moe_layers, mixture.num_experts) as theirs:
            answers = [logits.cpu() for logits in logits_of(found, here)]
        compared = compare(reference, answers, dtype)
        measured[implementation] = replace(compared, routing_agreement=agreement(ours, theirs))
    return measured
