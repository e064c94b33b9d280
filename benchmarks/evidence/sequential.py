"""Training on one domain after the other: what the second does to the first."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.evidence.arms import Sizes
from benchmarks.evidence.runs import Row, base_text_loss, fit, score, start


@dataclass(frozen=True, kw_only=True)
class Sequence2:
    """Losses of two domains, nats per token.

    Attributes:
        first_before: of the first, after training on it.
        first_after: of the first, after training on the second too.
        second_after: of the second, at the end.
        base_text: of plain text, at the end.
    """

    arm: str
    seed: int
    first_before: float
    first_after: float
    second_after: float
    base_text: float

    @property
    def interference(self) -> float:
        """How much the first domain lost."""
        return self.first_after - self.first_before


def run(
    arm: str, load: Callable[[], Any], tokenizer: Any, data: tuple[Sequence[Row], Sequence[Row]],
    names: tuple[str, str], texts: Sequence[str], sizes: Sizes, *, rate: float, steps: int,
    batch: int, seed: int,
) -> Sequence2:  # fmt: skip
    """Train on the first of `names`, then on the second.

    Args:
        arm: its name.
        load: returns a fresh base.
        tokenizer: of the base.
        data: training and test rows.
        names: of the two domains.
        texts: plain text, whose loss is taken at the end.
        sizes: of the mixture.
        rate: learning rate.
        steps: on each domain.
        batch: rows of a step.
        seed: of the order of the rows, the adapter's start and the router.
    """
    train, test = data
    model = start(arm, load, sizes, seed)
    of = {name: [row for row in test if row["domain"] == name] for name in names}
    how: dict[str, Any] = {"rate": rate, "steps": steps, "batch": batch, "seed": seed}
    before = 0.0
    for name in names:
        rows = [row for row in train if row["domain"] == name]
        fit(model, arm, tokenizer, rows, names, sizes, **how)
        if name == names[0]:
            before = score(model, arm, tokenizer, of[name], names, sizes)[name]
    after = score(model, arm, tokenizer, of[names[0]] + of[names[1]], names, sizes)
    return Sequence2(
        arm=arm,
        seed=seed,
        first_before=before,
        first_after=after[names[0]],
        second_after=after[names[1]],
        base_text=base_text_loss(model, tokenizer, texts),
    )
