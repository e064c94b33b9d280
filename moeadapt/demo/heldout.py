"""Held-out answers: negative log likelihood per row, standard errors, paired differences."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from moeadapt.demo.arms import BATCH, batch_of
from moeadapt.tuner.probe import evaluating, row_losses


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean and its standard error.

    Attributes:
        value: mean over rows, in nats per answer token.
        error: standard error of the mean.
    """

    value: float
    error: float

    @staticmethod
    def of(values: list[float]) -> "Mean":
        """Average rows."""
        data = torch.tensor(values, dtype=torch.float64)
        return Mean(value=data.mean().item(), error=data.std().item() / math.sqrt(len(values)))

    def __str__(self) -> str:
        """Show as 1.234 ± 0.056."""
        return f"{self.value:.3f} ± {self.error:.3f}"


def answer_nll(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]]
) -> list[float]:
    """Return the mean negative log likelihood of each row's answer, in nats per token."""
    result: list[float] = []
    with evaluating(model):
        for start in range(0, len(rows), BATCH):
            batch = batch_of(tokenizer, rows[start : start + BATCH], model.device)
            labels = batch.pop("labels")
            losses, counts = row_losses(model(**batch).logits, labels)
            result += [loss / count for loss, count in zip(losses, counts, strict=True)]
    return result


def by_domain(rows: list[dict[str, str]], values: list[float]) -> dict[str, Mean]:
    """Average rows within each domain."""
    groups: dict[str, list[float]] = {}
    for row, value in zip(rows, values, strict=True):
        groups.setdefault(row["domain"], []).append(value)
    return {domain: Mean.of(group) for domain, group in groups.items()}


def verdict(scores: dict[str, list[float]]) -> str:
    """Say which arm won, and whether the distance to the others is more than noise.

    Rows are the same for every arm, so arms are compared row by row.
    """
    ranked = sorted(scores, key=lambda name: Mean.of(scores[name]).value)
    best = ranked[0]
    lines = [f"Lowest held-out loss: {best}, {Mean.of(scores[best])} nats per answer token."]
    for other in ranked[1:]:
        gap = Mean.of([b - a for a, b in zip(scores[best], scores[other], strict=True)])
        sure = gap.value > 2 * gap.error
        judged = "clearly worse" if sure else "within noise (under 2 standard errors)"
        lines.append(f"  {other}: {gap.value:+.3f} ± {gap.error:.3f}, {judged}")
    return "\n".join(lines)
