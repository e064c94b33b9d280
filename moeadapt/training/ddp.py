"""DDP together with reentrant checkpointing, which needs the right answer to one question.

For a PEFT model the Trainer lets DDP search for unused parameters, and with reentrant checkpointing
torch then refuses the first backward ("marked as ready twice"). A mixture needs no search: every
expert takes part in every backward, with a gradient of zero if no token chose it.
"""

from typing import Any

from transformers import TrainingArguments

from moeadapt.errors import TrainingError


def fit_ddp(args: TrainingArguments) -> None:
    """Let DDP search for no unused parameters, where it cannot and nothing else was asked for.

    Args:
        args: of a trainer that is not built yet; `ddp_find_unused_parameters` becomes False if it
            is None and checkpointing is reentrant.
    """
    if _is_open(args):
        args.ddp_find_unused_parameters = False


def check_ddp(args: TrainingArguments) -> None:
    """Refuse what `fit_ddp` repairs, in a trainer that is built already.

    Raises:
        TrainingError: several processes, reentrant checkpointing, and a search for unused
            parameters.
    """
    if args.world_size > 1 and _is_open(args):
        raise TrainingError(
            "DDP cannot search for unused parameters with reentrant checkpointing, and a mixture "
            "has none; set ddp_find_unused_parameters=False, or use_reentrant=False in the "
            "checkpointing kwargs"
        )


def _is_open(args: Any) -> bool:
    """Whether checkpointing is reentrant and nobody said how DDP treats unused parameters."""
    if args.ddp_find_unused_parameters is not None:
        return False
    for kind in ("activation", "gradient"):  # older versions of transformers know the second only
        if getattr(args, f"{kind}_checkpointing", False):
            options = getattr(args, f"{kind}_checkpointing_kwargs", None) or {}
            return bool(options.get("use_reentrant", False))
    return False
