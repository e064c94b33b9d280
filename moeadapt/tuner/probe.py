"""Batches to measure a model on, and its loss on them, per labelled domain."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moeadapt.errors import ConfigError

IGNORED = -100
"""Label of a token that has no loss."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some rows: what the model is called with, what it should say, where they come from.

    Attributes:
        inputs: arguments of the model, without labels.
        labels: [rows, tokens], `IGNORED` where there is no loss.
        domains: name of each row's domain; None: not labelled.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    domains: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Mean loss per token, in nats.

    Attributes:
        mean: over all tokens.
        by_domain: over the tokens of each labelled domain.
    """

    mean: float
    by_domain: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON data."""
        return {"mean": self.mean, "by_domain": dict(self.by_domain)}


def read_batches(
    data: Iterable[Any],
    *,
    tokenizer: Any = None,
    domains: Sequence[str] | None = None,
    batch_size: int = 8,
    max_length: int = 1024,
) -> list[Batch]:
    """Put data into batches.

    Args:
        data: mappings with `input_ids` [rows, tokens], and maybe `attention_mask`, `labels` and
            `domain` (a name, or one per row); or texts.
        tokenizer: turns texts into tokens; needed for texts alone.
        domains: one name per row, over all batches.
        batch_size: rows of a batch of texts.
        max_length: tokens of a text, the rest is cut.

    Raises:
        ConfigError: there is no data, or it is of another form, or `domains` has another length.
    """
    items = list(data)
    if items and all(isinstance(item, str) for item in items):
        items = _tokenize(items, tokenizer, batch_size, max_length)
    names = None if domains is None else list(domains)
    batches, start = [], 0
    for item in items:
        if not isinstance(item, Mapping) or "input_ids" not in item:
            raise ConfigError(
                f"data holds a {type(item).__name__}; give texts with a tokenizer, or mappings "
                "with input_ids [rows, tokens]"
            )
        batch = _batch(item, None if names is None else names[start:])
        start += batch.labels.shape[0]
        batches.append(batch)
    if not batches:
        raise ConfigError("data is empty")
    if names is not None and len(names) != start:
        raise ConfigError(f"{len(names)} domains for {start} rows; give one per row")
    return batches


def _tokenize(
    texts: list[str], tokenizer: Any, batch_size: int, max_length: int
) -> list[dict[str, Tensor]]:
    if tokenizer is None or tokenizer.pad_token is None:
        raise ConfigError("texts need a tokenizer= with a padding token")
    return [
        dict(
            tokenizer(
                texts[i : i + batch_size],
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=max_length,
                return_token_type_ids=False,
            )
        )
        for i in range(0, len(texts), batch_size)
    ]


def _batch(item: Mapping[str, Any], domains: list[str] | None) -> Batch:
    inputs = {
        name: torch.as_tensor(value)
        for name, value in item.items()
        if name not in ("labels", "domain")
    }
    ids = inputs["input_ids"]
    if ids.dim() != 2:  # noqa: PLR2004
        raise ConfigError(f"input_ids has the shape {tuple(ids.shape)}; give [rows, tokens]")
    labels = item.get("labels")
    labels = ids if labels is None else torch.as_tensor(labels)
    if "attention_mask" in inputs:
        labels = labels.masked_fill(inputs["attention_mask"] == 0, IGNORED)
    own = item.get("domain")
    if domains is None and own is not None:
        domains = [own] * ids.shape[0] if isinstance(own, str) else [str(name) for name in own]
    if domains is not None and len(domains) < ids.shape[0]:
        raise ConfigError(f"{len(domains)} domains for {ids.shape[0]} rows; give one per row")
    named = None if domains is None else tuple(domains[: ids.shape[0]])
    return Batch(inputs=inputs, labels=labels, domains=named)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` into eval mode without gradients, and every module back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def keeping_trainable(model: nn.Module) -> Iterator[None]:
    """Put back afterwards which parameters are trained.

    PEFT makes an adapter trainable when it turns it on again, and a frozen one must stay frozen.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def call(model: nn.Module, batch: Batch) -> Tensor:
    """Run `model` on its own device; return its logits."""
    device = next(model.parameters()).device
    return model(**{name: value.to(device) for name, value in batch.inputs.items()}).logits


def measure_loss(model: nn.Module, batches: Iterable[Batch]) -> Loss | None:
    """Return the language-model loss of `model` in eval mode; None: it is no language model.

    Raises:
        ConfigError: no token has a label.
    """
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    total, tokens = 0.0, 0
    with evaluating(model):
        for batch in batches:
            logits = call(model, batch)
            if logits.dim() != 3:  # noqa: PLR2004
                return None
            loss, count = row_losses(logits, batch.labels.to(logits.device))
            total, tokens = total + sum(loss), tokens + sum(count)
            for name, one, n in zip(batch.domains or (), loss, count, strict=False):
                sums[name], counts[name] = sums.get(name, 0.0) + one, counts.get(name, 0) + n
    if not tokens:
        raise ConfigError("every label of the data is ignored, so there is no loss to measure")
    return Loss(
        mean=total / tokens, by_domain={n: s / max(counts[n], 1) for n, s in sorted(sums.items())}
    )


def row_losses(logits: Tensor, labels: Tensor) -> tuple[list[float], list[int]]:
    """Return each row's summed loss, in nats, and how many tokens it is the sum of."""
    told = labels[:, 1:]
    said = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(said.transpose(1, 2), told, ignore_index=IGNORED, reduction="none")
    return loss.double().sum(1).tolist(), (told != IGNORED).sum(1).tolist()
