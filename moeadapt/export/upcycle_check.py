"""Whether an upcycled checkpoint of plain copies still computes what its base does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moeadapt.errors import ExportError
from moeadapt.export.receipt import Measured, compare
from moeadapt.export.shards import common_dtype
from moeadapt.export.upcycle_job import Job
from moeadapt.export.verify import load_strictly, logits_of, probe_ids
from moeadapt.tuner.probe import evaluating

_EXACT = ("float32", "float64")


def dense_model(base: str | Path | PreTrainedModel, job: Job, dtype: torch.dtype | None) -> Any:
    """Return the dense model; that of a folder in eval mode, in `dtype` or its own if None."""
    if isinstance(base, PreTrainedModel):
        return base
    folder: Any = job.dense.folder
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype or "auto", trust_remote_code=False, local_files_only=True
    )
    return model.eval()


def compare_copies(base: str | Path | PreTrainedModel, job: Job, folder: Path) -> Measured:
    """Run base and checkpoint on the same tokens: in float32, or as the model in memory is."""
    config = job.target.dense
    dtype = base.dtype if isinstance(base, PreTrainedModel) else torch.float32
    model = dense_model(base, job, dtype)
    device = model.device
    ids = [text.to(device) for text in probe_ids(config.vocab_size, config.max_position_embeddings)]
    with evaluating(model):
        reference = [logits.cpu() for logits in logits_of(model, ids)]
    del model
    result: Any = load_strictly(folder, dtype).to(device)  # type: ignore[arg-type]
    if dtype == torch.float64:
        result.set_experts_implementation("eager")  # the others have no float64
    return compare(reference, [logits.cpu() for logits in logits_of(result, ids)], dtype)


def promised(
    measured: Measured, tolerance: float | None, tensors: Mapping[str, Any], dtype: Any
) -> float | None:
    """Return the largest difference that is allowed; None where the copies are rounded ones."""
    if tolerance is not None:
        return tolerance
    bits = torch.finfo(common_dtype(tensors)).bits
    kept = dtype is None or torch.finfo(dtype).bits >= bits
    return measured.float32_tolerance if kept and measured.dtype in _EXACT else None


def require_copies(measured: Measured, tolerance: float | None) -> None:
    """Refuse copies that are not the base.

    Args:
        measured: the comparison with it.
        tolerance: largest logit difference; None: what is no rounding to 16 bits is refused.

    Raises:
        ExportError: the difference is too large.
    """
    if tolerance is None and measured.is_beyond_rounding:
        raise ExportError(
            "the copies are not the base: logits differ in the mean by "
            f"{measured.mean_logit_difference:.1e} in {measured.dtype}, and the largest is "
            f"{measured.largest_logit:.1f}: that is no rounding"
        )
    if tolerance is not None and not measured.max_logit_difference <= tolerance:
        raise ExportError(
            f"the copies are not the base: logits differ by {measured.max_logit_difference:.1e} in "
            f"{measured.dtype}, allowed {tolerance:.1e}; set tolerance if that is the rounding you "
            "expect"
        )
