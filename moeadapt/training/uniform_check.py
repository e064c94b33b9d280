"""Whether learned routing is any better than equal shares, on evaluation batches."""

import inspect
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor, nn

from moeadapt.errors import TrainingError
from moeadapt.training.health import warn
from moeadapt.tuner.override import override_routing
from moeadapt.tuner.probe import evaluating

MOST_BATCHES = 8
"""Evaluation batches of each process that are computed twice."""


def compare_with_uniform(model: nn.Module, batches: Iterable[Any], device: torch.device) -> bool:
    """Warn if the routers' choice is no better than all experts in equal shares.

    Args:
        model: the model, without a distributed wrapper.
        batches: evaluation batches; the first `MOST_BATCHES` of them are used. Every process must
            call this function, with as many.
        device: where the model computes.

    Returns:
        Whether learned routing is better: a lower loss, the mean over batches and processes.

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
        learned = _mean_loss(model, some)
        with override_routing(model, router="uniform"):
            uniform = _mean_loss(model, some)
    if learned < uniform:
        return True
    warn(
        f"learned routing is no better than all experts in equal shares: loss {learned:.4f} and "
        f"{uniform:.4f} on the first {len(some)} evaluation batches. Train longer, raise the "
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


def _mean_loss(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> float:
    losses = torch.stack([model(**batch).loss.double() for batch in batches])
    sums = reduce(torch.stack([losses.sum(), losses.new_tensor(float(len(losses)))]))
    return float(sums[0] / sums[1])  # type: ignore[index]
