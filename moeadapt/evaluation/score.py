"""Negative log likelihood of each row's answer."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from moeadapt.errors import ConfigError
from moeadapt.evaluation.rows import EvalRow
from moeadapt.rows import pad
from moeadapt.tuner.probe import Batch, call, evaluating, row_losses


def score_rows(
    model: nn.Module, tokenizer: Any, rows: Sequence[EvalRow], *, batch_size: int
) -> list[float]:
    """Return each row's negative log likelihood in nats, summed over the tokens of its answer.

    Raises:
        ConfigError: the model is no language model, or a loss is not finite.
    """
    found = [0.0] * len(rows)
    with evaluating(model):
        for index in batches(rows, batch_size, lambda row: len(row.ids)):
            own = [rows[i] for i in index]
            inputs = pad([row.ids for row in own], [row.prompt for row in own], tokenizer)
            labels = inputs.pop("labels")
            logits = call(model, Batch(inputs=inputs, labels=labels))
            if logits.dim() != 3:  # noqa: PLR2004
                raise ConfigError(
                    f"{type(model).__name__} gave logits of shape {tuple(logits.shape)}; only "
                    "language models, [rows, tokens, vocabulary], are evaluated"
                )
            losses, counts = row_losses(logits, labels.to(logits.device))
            assert counts == [row.tokens for row in own]
            for i, loss in zip(index, losses, strict=True):
                if not math.isfinite(loss):
                    raise ConfigError(
                        f"the loss of row {i + 1} is {loss}, and what follows from it would mean "
                        "nothing; the adapter holds NaN, or float16 overflows: try dtype float32"
                    )
                found[i] = loss
    return found


def batches(
    rows: Sequence[EvalRow], batch_size: int, length: Callable[[EvalRow], int]
) -> Iterator[list[int]]:
    """Yield the positions of rows of like length, the longest first: they need most memory.

    Raises:
        ConfigError: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} must be at least 1")
    order = sorted(range(len(rows)), key=lambda i: -length(rows[i]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
