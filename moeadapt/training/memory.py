"""Explains an allocation that failed: what the run needs, and what makes it smaller."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_GIB = 2**30
_CPU = "DefaultCPUAllocator: can't allocate memory"

_GRADIENT_AND_MOMENTS = 12
"""Bytes of a trained parameter beside itself: a float32 gradient and Adam's two moments."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` says that memory could not be had."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or _CPU in str(error)


def explain_memory(args: Any, model: nn.Module, inputs: Any) -> str:
    """Return an estimate of what a step needs, and three settings that lower it.

    Args:
        args: the trainer's arguments.
        model: the model.
        inputs: the micro-batch.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    batch = ""
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    if isinstance(ids, Tensor) and ids.dim() > 1:
        rows, tokens = ids.shape[0], ids.shape[-1]
        width = getattr(getattr(model, "config", None), "vocab_size", 0) or 0
        logits = 8 * rows * tokens * width  # float32, with their gradient
        batch = (
            f", about {logits / _GIB:.2f} GiB for the logits of {rows} x {tokens} tokens, and the "
            "activations"
        )
    return (
        f"Estimate: {weights / _GIB:.2f} GiB of weights, "
        f"{trained * _GRADIENT_AND_MOMENTS / _GIB:.2f} GiB of gradients and optimizer state"
        f"{batch}. Lower per_device_train_batch_size (now {args.per_device_train_batch_size}; "
        f"raise gradient_accumulation_steps by as much), set gradient_checkpointing=true (now "
        f"{str(bool(_checkpoints(args))).lower()}), or lower max_length (now "
        f"{getattr(args, 'max_length', None)})."
    )


def _checkpoints(args: Any) -> Any:
    return getattr(args, "activation_checkpointing", None) or getattr(
        args, "gradient_checkpointing", None
    )
