"""One run: train an arm on rows, score it on held-out rows and on base text.

Letters: B rows of a batch, S tokens of a row.
"""

import math
import random
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.evidence.arms import Sizes, attach, routed
from moeadapt import stats
from moeadapt.demo.arms import batch_of
from moeadapt.routing import Routing

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
        curve: loss of each training step.
        seconds: of training.
        model: what was trained; None once it has been tested.
        losses: test loss of each domain, nats per token.
        experts: in use per token, averaged over the tokens and routers; 0 without a router.
        forgetting: rise of the loss of base text over the base model, nats per token; None for an
            oracle, since base text has no domain.
    """

    arm: str
    rate: float
    seed: int
    validation: float
    curve: list[float]
    seconds: float
    model: Any
    losses: dict[str, float] = field(default_factory=dict)
    experts: float = 0.0
    forgetting: float | None = None

    @property
    def test(self) -> float:
        """Mean over the domains."""
        return sum(self.losses.values()) / len(self.losses)

    @property
    def train_loss(self) -> float:
        """Mean over the last quarter of the steps."""
        return statistics.fmean(self.curve[-max(len(self.curve) // 4, 1) :])


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


def answer_losses(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return each row's summed answer loss and its number of answer tokens [B].

    The vocabulary is the widest matrix of a small model: columns in which no row has an answer
    do not go through it.

    Args:
        model: a causal language model.
        inputs: what it takes, and `labels` [B, S].
    """
    given = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    labels = inputs["labels"][:, 1:]
    columns = (labels != IGNORED).any(0).nonzero()[:, 0]
    logits = model(**given, logits_to_keep=columns).logits.float()
    kept = labels[:, columns]
    losses = F.cross_entropy(logits.flatten(0, 1), kept.flatten(), reduction="none")
    return losses.view_as(kept).sum(1), (kept != IGNORED).sum(1)


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
            total, count = answer_losses(model, inputs)
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
            total, count = answer_losses(model, inputs)
        for row, loss, tokens in zip(chosen, total.tolist(), count.tolist(), strict=True):
            sums[row["domain"]][0] += loss
            sums[row["domain"]][1] += tokens
    return {name: total / tokens for name, (total, tokens) in sums.items()}


def experts_in_use(routings: Iterable[Routing]) -> float:
    """Return how many experts a token uses, averaged over real tokens and routers."""
    counts = [float(stats.token_mean(stats.active(one), one)) for one in routings]
    return statistics.mean(counts) if counts else 0.0


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
