"""Held-out loss under other ways of routing, and intervals of it by a bootstrap over texts.

Letters: N texts, A arms, R resamples, T tokens, E experts, B texts of a batch, S longest of them, V
vocabulary.

Source: percentile bootstrap, Efron and Tibshirani 1993, section 13.3; the unit is a text, since the
tokens of one text are no independent draws.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from moeadapt.errors import ConfigError
from moeadapt.report.data import Arm
from moeadapt.report.texts import TextBatch
from moeadapt.routing import Routing
from moeadapt.tuner.override import Edit, override_routing
from moeadapt.tuner.probe import call

LEARNED, UNIFORM, RANDOM, SHUFFLED = "learned", "uniform", "random", "shuffled"
SINGLE, OFF = "best single expert", "adapter off"

MOST_SINGLE = 64
"""Experts that are tried alone, from the first one."""

COVERAGE = 0.95
"""Of every interval."""

_MOST_ENTRIES = 2**23
"""Entries of a table of resamples that are made at a time: 64 MB."""


def text_losses(logits: Float[Tensor, "B S V"], batch: TextBatch) -> list[float]:
    """Return the summed negative log-likelihood of each text's tokens but the first, in nats."""
    ids = batch.inputs.labels.to(logits.device)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    found = []
    # Row by row: a copy of all logits in float32 would be the largest tensor of the report.
    for row, length in enumerate(batch.lengths):
        said, told = logits[row, : length - 1].to(dtype), ids[row, 1:length]
        loss = F.cross_entropy(said, told, reduction="none")
        found.append(float(loss.cpu().double().sum()))
    return found


def measure_arms(
    model: nn.Module,
    batches: Sequence[TextBatch],
    learned: Float[Tensor, " N"],
    num_experts: int,
    seed: int,
) -> dict[str, Float[Tensor, " N"]]:
    """Return the summed loss of each text under each arm, `learned` first, in nats.

    The best single expert gets every token of every layer alone, see `best_single`.

    Args:
        model: a PEFT model in eval mode, without gradients.
        batches: all texts.
        learned: what the router's own routing gave.
        num_experts: of the layer that has the fewest; the first `MOST_SINGLE` are tried.
        seed: of the random arms.
    """
    found = {LEARNED: learned}
    for name in (UNIFORM, RANDOM, SHUFFLED):
        with override_routing(model, router=name, seed=seed):
            found[name] = _losses(model, batches, len(learned))
    alone = []
    for expert in range(min(num_experts, MOST_SINGLE)):
        with override_routing(model, edit=_only(expert)):
            alone.append(_losses(model, batches, len(learned)))
    found[SINGLE] = best_single(torch.stack(alone))
    with adapter_off(model):
        found[OFF] = _losses(model, batches, len(learned))
    return found


def best_single(alone_EN: Float[Tensor, "E N"]) -> Float[Tensor, " N"]:
    """Return each text's loss with the expert that is the best one on the other half of the texts.

    The smallest of many losses on the very texts that they are compared on is small by luck too, so
    every text is judged with an expert that was chosen without it. The halves are the texts of even
    and of odd number, so that both have texts of every domain that has two. A single text has no
    other half and gets the first expert; no verdict is drawn from so few.

    Args:
        alone_EN: summed loss of each text with each expert alone.
    """
    even_N = torch.arange(alone_EN.shape[1]) % 2 == 0
    found_N = torch.empty_like(alone_EN[0])
    for half_N in (even_N, ~even_N):
        chosen = int(alone_EN[:, ~half_N].sum(1).argmin())
        found_N[half_N] = alone_EN[chosen, half_N]
    return found_N


def _only(expert: int) -> Edit:
    """Return what gives a token's whole weight to `expert`.

    As `force` does, which refuses an expert that another, inactive adapter of a layer has not.
    """

    def edit(layer: str, routing: Routing) -> Float[Tensor, "T E"]:
        own = routing.expert_weights
        weights = torch.zeros_like(own)
        weights[:, expert] = own.sum(-1)
        return weights

    return edit


def adapter_off(model: nn.Module) -> AbstractContextManager[None]:
    """Return PEFT's own way of turning every adapter off for a `with` block."""
    disable: Callable[[], AbstractContextManager[None]] | None
    disable = getattr(model, "disable_adapter", None)
    return nullcontext() if disable is None else disable()


def _losses(model: nn.Module, batches: Sequence[TextBatch], num_texts: int) -> Tensor:
    total = torch.zeros(num_texts, dtype=torch.float64)
    for batch in batches:
        values = text_losses(call(model, batch.inputs), batch)
        total[batch.texts] = torch.tensor(values, dtype=torch.float64)
    return total


def summarize(
    losses: Mapping[str, Float[Tensor, " N"]],
    tokens: Float[Tensor, " N"],
    resamples: int,
    seed: int,
) -> list[Arm]:
    """Turn summed losses into means per token with intervals, differences text by text.

    Args:
        losses: what `measure_arms` returned.
        tokens: tokens with a loss, of each text.
        resamples: of the bootstrap, >= 1.
        seed: of the bootstrap.

    Raises:
        ConfigError: no text has two tokens, or a loss is not finite.
    """
    kept = tokens > 0
    if not kept.any():
        raise ConfigError("no text has two tokens, so there is no loss; give longer texts")
    for name, loss in losses.items():
        if not torch.isfinite(loss).all():
            raise ConfigError(
                f"the loss with routing {name!r} is not finite: training diverged, or the type "
                "the model is loaded in is too small; load it in float32 or bfloat16"
            )
    sums_NA = torch.stack([loss[kept] for loss in losses.values()], -1)
    both_NA = torch.cat([sums_NA, sums_NA - sums_NA[:, :1]], -1)
    count_N = tokens[kept].double()
    mean = (both_NA.sum(0) / count_N.sum()).tolist()
    parts = [
        part @ both_NA / (part @ count_N).unsqueeze(-1)
        for part in resample(len(count_N), resamples, seed)
    ]
    tail = (1 - COVERAGE) / 2
    levels = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    low, high = torch.cat(parts).quantile(levels, dim=0).tolist()
    half = len(losses)
    return [
        Arm(
            name=name,
            nll=mean[i],
            nll_low=low[i],
            nll_high=high[i],
            difference=mean[half + i],
            difference_low=low[half + i],
            difference_high=high[half + i],
        )
        for i, name in enumerate(losses)
    ]


def resample(num_texts: int, resamples: int, seed: int) -> Iterator[Float[Tensor, "R N"]]:
    """Yield, in parts, how often each text is drawn in each resample of as many texts."""
    generator = torch.Generator().manual_seed(seed)
    at_once = max(1, _MOST_ENTRIES // num_texts)
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        drawn = torch.randint(num_texts, (rows, num_texts), generator=generator)
        times = torch.zeros(rows, num_texts, dtype=torch.float64)
        yield times.scatter_add_(1, drawn, torch.ones_like(times))
