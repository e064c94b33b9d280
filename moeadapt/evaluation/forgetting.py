"""`forgetting`: how much worse an adapter makes the base model's own text."""

from collections.abc import Sequence
from typing import Any

from moeadapt.errors import ConfigError
from moeadapt.evaluation.compare import compare
from moeadapt.evaluation.results import Forgetting
from moeadapt.evaluation.run import evaluate
from moeadapt.rows import Row
from moeadapt.tuner.probe import keeping_trainable


def forgetting(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    batch_size: int = 8,
    max_length: int = 1024,
    seed: int = 0,
) -> Forgetting:
    """Measure the loss on ordinary text with the adapter on and off.

    Args:
        model: a PEFT model.
        tokenizer: its tokenizer.
        rows: each has `text`, as the base model was trained on; and maybe `domain`.
        batch_size: rows computed together.
        max_length: tokens of a row, the rest is cut.
        seed: of the bootstrap.

    Raises:
        ConfigError: the model has no adapter to switch off, or a row is no text.
    """
    if not hasattr(model, "disable_adapter"):
        raise ConfigError(f"{type(model).__name__} has no adapter to switch off; give a PEFT model")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or "text" not in row:
            raise ConfigError(f"row {number} of the base's own text has no text column")
    settings: Any = {"batch_size": batch_size, "max_length": max_length, "seed": seed}
    with keeping_trainable(model), model.disable_adapter():
        off = evaluate(model, tokenizer, rows, **settings)
    on = evaluate(model, tokenizer, rows, **settings)
    return Forgetting(off=off, on=on, change=compare(off, on, seed=seed))
