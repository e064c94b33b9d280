"""Texts as tokens: which text belongs to which domain, batches of them, and each token's own text.

Letters: B texts of a batch, S longest of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from moeadapt.errors import ConfigError
from moeadapt.tuner.probe import Batch


@dataclass(frozen=True, kw_only=True)
class TokenizedText:
    """One text.

    Attributes:
        domain: index of its domain.
        text: as it was given.
        ids: its tokens, never empty.
        cut: whether it has more.
    """

    domain: int
    text: str
    ids: list[int]
    cut: bool = False


@dataclass(frozen=True, kw_only=True)
class TextBatch:
    """Some texts beside each other, padded on the right.

    Attributes:
        texts: index of each row's text, among all.
        lengths: real tokens of each row; those after them are padding.
        inputs: what the model is called with.
    """

    texts: list[int]
    lengths: list[int]
    inputs: Batch

    def real(self) -> tuple[Int[Tensor, " T"], Int[Tensor, " T"]]:
        """Return the position of every real token among B * S, and the row it is in."""
        mask = self.inputs.inputs["attention_mask"].flatten()
        width = self.inputs.labels.shape[1]
        positions = mask.nonzero().squeeze(-1)
        return positions, positions // width


def check_texts(texts: Any) -> None:
    """Refuse what are no texts by domain.

    Raises:
        ConfigError: there are none, a domain has none, or something is no text.
    """
    if not isinstance(texts, Mapping):
        raise ConfigError(
            f"texts is a {type(texts).__name__}; give a mapping of domains to their texts, for "
            'example {"all": [...]}'
        )
    if not texts:
        raise ConfigError("texts is empty; give a mapping of domains to their texts")
    for domain, own in texts.items():
        if isinstance(own, str) or not isinstance(own, Sequence):
            raise ConfigError(
                f"the texts of domain {domain!r} are a {type(own).__name__}; give a list of texts"
            )
        if not own:
            raise ConfigError(f"domain {domain!r} has no texts; give some, or leave it out")
        for i, text in enumerate(own):
            if not isinstance(text, str):
                raise ConfigError(f"text {i} of domain {domain!r} is a {type(text).__name__}")


def tokenize(
    texts: Mapping[str, Sequence[str]], tokenizer: Any, max_length: int
) -> list[TokenizedText]:
    """Return all texts, domain after domain.

    Args:
        texts: domain -> its texts, see `check_texts`.
        tokenizer: of the model; adds the special tokens it adds by default.
        max_length: tokens of a text, the rest is cut.

    Raises:
        ConfigError: a text has no tokens.
    """
    found = []
    for number, (domain, own) in enumerate(texts.items()):
        for i, text in enumerate(own):
            ids = _ids(tokenizer, text, max_length)
            if not ids:
                raise ConfigError(f"text {i} of domain {domain!r} has no tokens; leave it out")
            cut = len(ids) >= max_length and len(_ids(tokenizer, text, max_length + 1)) > len(ids)
            found.append(TokenizedText(domain=number, text=text, ids=list(ids), cut=cut))
    return found


def _ids(tokenizer: Any, text: str, max_length: int) -> list[int]:
    return tokenizer(text, truncation=True, max_length=max_length)["input_ids"]


def spread(texts: Sequence[TokenizedText]) -> list[int]:
    """Return the indices of `texts` in an order that spreads each domain evenly.

    Shuffled routing trades weights inside a batch: a batch of one domain would keep what the router
    knows of domains.
    """
    sizes: dict[int, int] = {}
    places = []
    for text in texts:
        places.append(sizes.get(text.domain, 0))
        sizes[text.domain] = places[-1] + 1

    def place(i: int) -> tuple[float, int]:
        domain = texts[i].domain
        return (places[i] + 0.5) / sizes[domain], domain

    return sorted(range(len(texts)), key=place)


def to_batches(
    texts: Sequence[TokenizedText], batch_size: int, pad_token_id: int
) -> list[TextBatch]:
    """Put texts into batches, in the order of `spread`.

    Args:
        texts: all of them.
        batch_size: texts of a batch, >= 1.
        pad_token_id: what stands after a shorter text, masked.
    """
    order = spread(texts)
    return [
        _batch(texts, order[start : start + batch_size], pad_token_id)
        for start in range(0, len(order), batch_size)
    ]


def _batch(texts: Sequence[TokenizedText], own: list[int], pad_token_id: int) -> TextBatch:
    lengths = [len(texts[i].ids) for i in own]
    ids_BS = torch.full((len(own), max(lengths)), pad_token_id)
    mask_BS = torch.zeros_like(ids_BS)
    for row, i in enumerate(own):
        ids_BS[row, : lengths[row]] = torch.tensor(texts[i].ids)
        mask_BS[row, : lengths[row]] = 1
    inputs = Batch(inputs={"input_ids": ids_BS, "attention_mask": mask_BS}, labels=ids_BS)
    return TextBatch(texts=own, lengths=lengths, inputs=inputs)


def pieces(text: TokenizedText, tokenizer: Any) -> list[str]:
    """Return what each token of `text` stands for.

    Where the tokenizer knows the places of its tokens, the pieces of a text that is not cut are the
    text; spaces between two tokens go to the second one. Special tokens have their own names.
    """
    if not getattr(tokenizer, "is_fast", False):
        return [tokenizer.decode([token]) for token in text.ids]
    coded = tokenizer(
        text.text, truncation=True, max_length=len(text.ids), return_offsets_mapping=True
    )
    found, last = [], 0
    for token, (start, end) in zip(coded["input_ids"], coded["offset_mapping"], strict=True):
        if start == end:
            found.append(tokenizer.decode([token]))
        else:
            # A character of several tokens is said once, by the first of them.
            found.append(text.text[last : max(last, end)])
            last = max(last, end)
    return found
