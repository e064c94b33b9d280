"""One run: train an arm on rows, score it on held-out rows and on base text.

Letters: B rows of a batch, S tokens of a row.
"""

import math
import random
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
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
        parameters: trainable.
        file_size: of the saved adapter, bytes.
        step_seconds: median of a training step.
        peak_memory: most memory the process ever held, bytes; of a GPU, what was allocated.
        generated: tokens decoded per second, greedy, one sequence.
    """

    arm: str
    rate: float
    seed: int
    validation: float
    losses: dict[str, float]
    forgetting: float
    parameters: int
    file_size: int = 0
    step_seconds: float = 0.0
    peak_memory: int = 0
    generated: float = 0.0
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
) -> tuple[list[float], float]:  # fmt: skip
    """Train with AdamW, a linear warm-up and a cosine; return losses and median step seconds."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, rate, weight_decay=0.0)
    warm = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / steps))),
    )
    curve, seconds = [], []
    model.train()
    for chosen in batches(rows, batch, steps, seed):
        start = time.perf_counter()
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
        seconds.append(time.perf_counter() - start)
    return curve, sorted(seconds)[len(seconds) // 2]


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


def tokens_per_second(model: Any, tokenizer: Any, prompt: str, tokens: int = 24) -> float:
    """Return how fast it decodes greedily."""
    model.eval()
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    mask = torch.ones_like(ids)
    model.generate(input_ids=ids, attention_mask=mask, **{**settings, "min_new_tokens": 2})
    start = time.perf_counter()
    model.generate(input_ids=ids, attention_mask=mask, **settings)
    return tokens / (time.perf_counter() - start)


def peak_memory(device: torch.device) -> int:
    """Return bytes: of a GPU what was allocated at most, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def adapter_bytes(model: Any) -> int:
    """Return the size of the weights file."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))


def parameters(model: Any) -> int:
    """Count the trainable numbers."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def start(arm: str, load: Any, sizes: Sizes, seed: int) -> Any:
    """Return a fresh model of an arm."""
    return attach(arm, load(), sizes, seed)
