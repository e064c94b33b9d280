"""The loss of every text, with padding left out: what most questions compare.

Letters: B rows of a batch, S tokens of a row, P = S - 1 predicted ones, V vocabulary, N texts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from moeadapt.errors import ConfigError
from moeadapt.tuner.probe import IGNORED, Batch, call, evaluating, read_batches


@dataclass(frozen=True, kw_only=True)
class TextLosses:
    """Negative log-likelihood of each text.

    Attributes:
        nll: sum over its counted tokens, in nats.
        tokens: how many tokens are counted.
        domains: name of its domain; None: not labelled.
    """

    nll: Float[Tensor, " N"]
    tokens: Float[Tensor, " N"]
    domains: tuple[str | None, ...]

    @property
    def mean(self) -> float:
        """Mean over all tokens, in nats per token."""
        return float(self.nll.sum() / self.tokens.sum())


def as_batches(data: Iterable[Any]) -> list[Batch]:
    """Return `data` as batches: they are, or `read_batches` makes them.

    Raises:
        ConfigError: it is empty or of another form, or its shapes do not fit together.
    """
    if isinstance(data, Batch):
        return [data]
    items = list(data)
    if any(isinstance(item, str) for item in items):
        raise ConfigError(
            "these are texts; make batches with "
            "moeadapt.interpret.read_batches(texts, tokenizer=tokenizer)"
        )
    if items and all(isinstance(item, Batch) for item in items):
        return items
    for item in items:
        if isinstance(item, Mapping) and "input_ids" in item:
            _check_shapes(item)
    return read_batches(items)


def _check_shapes(item: Mapping[str, Any]) -> None:
    shape = tuple(torch.as_tensor(item["input_ids"]).shape)
    for name in ("attention_mask", "labels"):
        own = shape if item.get(name) is None else tuple(torch.as_tensor(item[name]).shape)
        if own != shape:
            raise ConfigError(
                f"{name} has the shape {own}, input_ids {shape}; give one entry per token"
            )


def real_tokens(batch: Batch) -> Bool[Tensor, "B S"]:
    """Return which tokens are no padding."""
    ids, mask = batch.inputs["input_ids"], batch.inputs.get("attention_mask")
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    return mask.bool()


def counted_tokens(batch: Batch) -> Bool[Tensor, "B P"]:
    """Return which of the tokens from the second on have a loss.

    Not the first token of a row that is padded on the left: it is predicted from padding.
    """
    real = real_tokens(batch)
    return (batch.labels[:, 1:] != IGNORED) & real[:, 1:] & real[:, :-1]


def token_nll(logits: Float[Tensor, "B S V"], batch: Batch) -> Float[Tensor, "B P"]:
    """Return -log p of each token from the second on, in nats; 0 where it is not counted."""
    told = batch.labels[:, 1:].masked_fill(~counted_tokens(batch), IGNORED).to(logits.device)
    said = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(said.transpose(1, 2), told, ignore_index=IGNORED, reduction="none")


def logits_of(model: nn.Module, batch: Batch) -> Float[Tensor, "B S V"]:
    """Run `model` on a batch.

    Raises:
        ConfigError: it is no language model.
    """
    logits = call(model, batch)
    if logits.dim() != 3 or logits.shape[:2] != batch.labels.shape:  # noqa: PLR2004
        raise ConfigError(
            f"{type(model).__name__} returns logits of shape {tuple(logits.shape)} for "
            f"{tuple(batch.labels.shape)} tokens; this question is about a language model's loss, "
            "one prediction per token"
        )
    return logits


def text_losses(model: nn.Module, batches: Sequence[Batch]) -> TextLosses:
    """Measure every text in eval mode without gradients, as the model routes now.

    Raises:
        ConfigError: it is no language model, or no token has a label.
    """
    require_labels(batches)
    sums, counts, domains = [], [], []
    with evaluating(model):
        for batch in batches:
            nll = token_nll(logits_of(model, batch), batch)
            sums.append(nll.double().sum(1).cpu())
            counts.append(counted_tokens(batch).sum(1).double().cpu())
            domains += batch.domains or (None,) * len(batch.labels)
    return TextLosses(nll=torch.cat(sums), tokens=torch.cat(counts), domains=tuple(domains))


def require_labels(batches: Sequence[Batch]) -> None:
    """Refuse data without any token to predict.

    Raises:
        ConfigError: no token has a label.
    """
    if not any(bool(counted_tokens(batch).any()) for batch in batches):
        raise ConfigError(
            "no token of the data has a label, so there is no loss to measure; give texts of two "
            "tokens or more, and labels that are not all -100"
        )
