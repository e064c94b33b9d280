"""Whether learned routing is any better than equal shares, on evaluation batches."""

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor, nn

from moeadapt.errors import TrainingError
from moeadapt.training.health import warn
from moeadapt.tuner.override import override_routing
from moeadapt.tuner.probe import evaluating, row_losses

MOST_BATCHES = 8
"""Evaluation batches of each process that are computed twice."""

LEAST_ROWS = 8
"""Rows of all processes below which no interval says anything."""

ERRORS = 2.4
"""Standard errors on either side of a difference, 95 % by Student's t with 8 rows."""

MARGIN = 0.01
"""Nats per token up to which learned routing is no better in any way that matters."""


def compare_with_uniform(model: nn.Module, batches: Iterable[Any], device: torch.device) -> bool:
    """Warn if the routers' choice is shown to be no better than all experts in equal shares.

    Row by row, so that what makes a row hard cancels. It is shown where the interval of learned
    minus uniform is not below 0 and excludes a gain of more than `MARGIN`; a wide interval, as of
    few rows with a tie, shows nothing.

    Args:
        model: the model, without a distributed wrapper.
        batches: evaluation batches; the first `MOST_BATCHES` of them are used. Every process must
            call this function, with as many.
        device: where the model computes.

    Returns:
        Whether nothing was to be warned of. Fewer than `LEAST_ROWS` rows are warned of too.

    Raises:
        TrainingError: there are no batches, or they have no labels, as in preference training.
    """
    # accelerate's own loader would count as running after a loop that stops early, and a loader
    # draws a seed from the global generator: the training must not notice.
    batches = getattr(batches, "base_dataloader", batches)
    with torch.random.fork_rng(devices=[]):
        some = [_inputs(batch, model, device) for batch in islice(batches, MOST_BATCHES)]
    if not some:
        raise TrainingError(
            "compare_uniform=True, and the evaluation gave no batches; give an eval_dataset"
        )
    with evaluating(model):
        learned, tokens = _row_losses(model, some)
        with override_routing(model, router="uniform"):
            uniform, _ = _row_losses(model, some)
    rows, total, mean, error = _difference(learned - uniform, tokens)
    if rows < LEAST_ROWS:
        warn(
            f"compare_uniform=True: {rows} evaluation rows are too few to compare learned routing "
            f"with equal shares; give at least {LEAST_ROWS}"
        )
        return False
    low, high = mean - ERRORS * error, mean + ERRORS * error
    if high < 0 or low < -MARGIN:
        return True
    loss = float(_over_processes(learned.sum())) / total
    warn(
        f"learned routing is no better than all experts in equal shares: loss {loss:.4f} and "
        f"{loss - mean:.4f} nats per token, a difference of {low:+.4f} to {high:+.4f} by {rows} "
        f"rows of the first {len(some)} evaluation batches. Train longer, raise the "
        "router's learning rate, lower k, or lower the coefficient of the balance loss; if it "
        "stays so, a plain LoRA of the same total rank does the same for less."
    )
    return False


def _inputs(batch: Any, model: nn.Module, device: torch.device) -> dict[str, Any]:
    """Return what the base model takes of a batch."""
    if not isinstance(batch, Mapping) or "labels" not in batch:
        columns = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise TrainingError(
            "compare_uniform=True compares the loss on labels, and the evaluation batches have "
            f"{columns}; leave it out, or evaluate on labelled rows as SFT does"
        )
    base: Any = model
    if hasattr(base, "get_base_model"):
        base = base.get_base_model()
    known = inspect.signature(type(base).forward).parameters
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
        if name in known
    }


def _row_losses(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
    """Return each row's summed loss and its tokens, rows without any left out."""
    losses, counts = [], []
    for batch in batches:
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        loss, count = row_losses(logits, batch["labels"])
        losses += loss
        counts += count
    device = batches[0]["labels"].device
    loss_N = torch.tensor(losses, dtype=torch.float64, device=device)
    count_N = torch.tensor(counts, dtype=torch.float64, device=device)
    return loss_N[count_N > 0], count_N[count_N > 0]


def _difference(sums: Tensor, tokens: Tensor) -> tuple[int, float, float, float]:
    """Return rows, tokens, the mean per token and its standard error, over all processes."""
    one = torch.ones_like(sums)
    products = [one, tokens, sums, tokens * tokens, sums * tokens, sums * sums]
    found = _over_processes(torch.stack([product.sum() for product in products]))
    rows, total, part, tt, st, ss = found.tolist()
    mean = part / max(total, 1.0)
    # The linearised ratio: how far each row is from its share of the mean.
    spread = max(ss - 2 * mean * st + mean * mean * tt, 0.0)
    error = math.sqrt(spread * rows / max(rows - 1, 1.0)) / max(total, 1.0)
    return int(rows), total, mean, error


def _over_processes(value: Tensor) -> Tensor:
    found = reduce(value, reduction="sum")
    assert isinstance(found, Tensor)
    return found
