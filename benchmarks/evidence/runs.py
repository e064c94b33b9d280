"""One run: train an arm on rows, score it on held-out rows and on base text.

Letters: B rows of a batch, S tokens of a row.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.evidence.arms import Sizes, attach, routed
from moeadapt.demo.arms import batch_of

Row = dict[str, str]
IGNORED = -100


@dataclass(kw_only=True)
class Run:
    """What one run measured.

    Attributes:
        arm: its name.
        rate: learning rate.
        seed: of the data's order, the adapter's start and the router.
        validation: mean loss of the validation answers, nats per token.
        losses: test loss of each domain, nats per token.
        forgetting: rise of the loss of base text over the base model, nats per token.
        curve: loss of each training step.
    """

    arm: str
    rate: float
    seed: int
    validation: float
    losses: dict[str, float]
    forgetting: float
    curve: list[float] = field(default_factory=list)

    @property
    def test(self) -> float:
        """Mean over the domains."""
        return sum(self.losses.values()) / len(self.losses)


def batches(rows: Sequence[Row], size: int, steps: int, seed: int) -> Iterator[list[Row]]:
    """Return `steps` batches; rows come round again in another order."""
    order: list[int] = []
    generator = random.Random(seed)
    for _ in range(steps):
        while len(order) < size:
            again = list(range(len(rows)))
            generator.shuffle(again)
            order += again
        yield [rows[order.pop(0)] for _ in range(size)]


def answer_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's summed answer loss and its number of answer tokens [B]."""
    losses = F.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none"
    )
    return losses.sum(1), (labels[:, 1:] != IGNORED).sum(1)


def fit(
    model: Any, arm: str, tokenizer: Any, rows: Sequence[Row], names: Sequence[str], sizes: Sizes,
    *, rate: float, steps: int, batch: int, seed: int,
) -> list[float]:  # fmt: skip
    """Train with AdamW, a linear warm-up and a cosine; return the losses."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, rate, weight_decay=0.0)
    warm = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / steps))),
    )
    curve = []
    model.train()
    for chosen in batches(rows, batch, steps, seed):
        inputs = batch_of(tokenizer, chosen, model.device)
        domains = [names.index(row["domain"]) for row in chosen]
        with routed(arm, model, domains, inputs["input_ids"].shape[1], sizes):
            labels = inputs.pop("labels")
            total, count = answer_losses(model(**inputs).logits, labels)
        loss = total.sum() / count.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        curve.append(float(loss.detach()))
    return curve


def score(
    model: Any, arm: str, tokenizer: Any, rows: Sequence[Row], names: Sequence[str], sizes: Sizes,
    batch: int = 8,
) -> dict[str, float]:  # fmt: skip
    """Return the loss of each domain's answers, nats per token."""
    sums = {name: [0.0, 0] for name in dict.fromkeys(row["domain"] for row in rows)}
    model.eval()
    # Rows of one domain are alike in length, so little is padding.
    ordered = sorted(rows, key=lambda row: (row["domain"], len(row["completion"])))
    for start in range(0, len(ordered), batch):
        chosen = ordered[start : start + batch]
        inputs = batch_of(tokenizer, chosen, model.device)
        domains = [names.index(row["domain"]) for row in chosen]
        length = inputs["input_ids"].shape[1]
        with torch.no_grad(), routed(arm, model, domains, length, sizes):
            labels = inputs.pop("labels")
            total, count = answer_losses(model(**inputs).logits, labels)
        for row, loss, tokens in zip(chosen, total.tolist(), count.tolist(), strict=True):
            sums[row["domain"]][0] += loss
            sums[row["domain"]][1] += tokens
    return {name: total / tokens for name, (total, tokens) in sums.items()}


def base_text_loss(model: Any, tokenizer: Any, texts: Sequence[str]) -> float:
    """Return the loss of plain text, nats per token."""
    total = tokens = 0.0
    model.eval()
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids[:, :256].to(model.device)
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss
        total += float(loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    return total / tokens


def start(arm: str, load: Any, sizes: Sizes, seed: int) -> Any:
    """Return a fresh model of an arm."""
    return attach(arm, load(), sizes, seed)
