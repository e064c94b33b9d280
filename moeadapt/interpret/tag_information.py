"""How much does a tag of a token, its domain or part of speech, say about its main expert?

Letters: N real tokens.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from moeadapt.errors import ConfigError, did_you_mean
from moeadapt.interpret.information import Information, compare_with_chance, shuffled
from moeadapt.interpret.losses import as_batches, real_tokens
from moeadapt.interpret.observe import Observed, observe
from moeadapt.interpret.scope import choose_layers
from moeadapt.tuner.probe import Batch

TAGS = ("domain", "position", "token_id")
"""Tags that every token has."""


@dataclass(frozen=True, kw_only=True)
class TagInformation:
    """What a tag says.

    Attributes:
        permuted: `texts`: the tag is the same all through each text, and whole texts traded their
            tags in the permutations; `tokens`: tokens did.
        layers: layer or block -> mutual information of tag and main expert.
    """

    permuted: str
    layers: dict[str, Information]


def tag_information(
    model: nn.Module,
    batches: Iterable[Any],
    tags: str | Sequence[Any] = "domain",
    *,
    layers: Sequence[str] | None = None,
    permutations: int = 200,
    seed: int = 0,
) -> TagInformation:
    """Measure the mutual information of a tag and the main expert, against chance.

    A token's main expert has its largest weight; tokens that use none count as using one more.
    One pass over the batches.

    Where a tag differs within a text, permutations treat tokens as independent. Tokens of one
    text are not, so that p-values are too small then: read them as a lower bound.

    Args:
        model: the model, in any wrapper.
        batches: what to measure on, see `read_batches`.
        tags: `domain`, `position` (in the text) or `token_id`; or one array per batch, of the
            shape of its `input_ids`, of numbers or strings. Those of padding are not read.
        layers: layers or blocks, named as by `collect_routing`; None: all.
        permutations: for chance, at least 1; the smallest p-value is 1 / (1 + permutations).
        seed: of the permutations.

    Raises:
        ConfigError: no mixture, or several, are active; no such layer or tag; an array of another
            shape; `domain` and a row without; no data.
        UnsupportedError: a layer does not route these tokens one by one.

    Example:
        >>> tag_information(model, batches, "domain").layers["model.layers.0.mlp"].bits
    """
    names = list(choose_layers(model, layers))
    data = as_batches(batches)
    given = None if isinstance(tags, str) else _given(data, tags)
    if isinstance(tags, str) and tags not in TAGS:
        raise ConfigError(
            f"unknown tag {tags!r}{did_you_mean(tags, TAGS)}; one of {list(TAGS)}, or one array "
            "per batch"
        )
    if tags == "domain":
        given = _domains(data)
    seen = observe(model, data, names)
    labels = _numbers(given) if given is not None else _own(seen, str(tags))
    permuted, shuffle = _shuffle(labels, seen.texts)
    return TagInformation(
        permuted=permuted,
        layers=compare_with_chance(labels, seen.main_experts(), shuffle, permutations, seed),
    )


def _shuffle(
    labels: Int[Tensor, " N"], texts: Int[Tensor, " N"]
) -> tuple[str, Callable[[torch.Generator], Tensor]]:
    """Return what trades labels in a permutation, `texts` or `tokens`, and what does it."""
    of_texts = _of_texts(labels, texts)
    if of_texts is None:
        return "tokens", shuffled(labels)
    trade = shuffled(of_texts)
    number = torch.unique(texts, return_inverse=True)[1]
    return "texts", lambda generator: trade(generator)[number]


def _own(seen: Observed, tag: str) -> Int[Tensor, " N"]:
    values = seen.positions if tag == "position" else seen.token_ids
    return torch.unique(values, return_inverse=True)[1]


def _domains(data: Sequence[Batch]) -> list[Any]:
    if any(batch.domains is None for batch in data):
        raise ConfigError(
            "tags='domain', and the batches have no domains; give one per row: "
            "read_batches(..., domains=...)"
        )
    return [
        domain
        for batch in data
        for domain, row in zip(batch.domains or (), real_tokens(batch), strict=True)
        for _ in range(int(row.sum()))
    ]


def _given(data: Sequence[Batch], tags: Sequence[Any]) -> list[Any]:
    """Return the tag of each real token."""
    if len(tags) != len(data):
        raise ConfigError(f"tags has {len(tags)} arrays for {len(data)} batches; give one each")
    found = []
    for index, (batch, array) in enumerate(zip(data, tags, strict=True)):
        real = real_tokens(batch).tolist()
        rows = array.tolist() if hasattr(array, "tolist") else [list(row) for row in array]
        if [len(row) for row in rows] != [len(row) for row in real]:
            raise ConfigError(
                f"tags[{index}] has not the shape {tuple(batch.labels.shape)} of the batch's "
                "input_ids; give one tag per token, padding included"
            )
        for row, kept in zip(rows, real, strict=True):
            found += [tag for tag, keep in zip(row, kept, strict=True) if keep]
    return found


def _numbers(tags: Sequence[Any]) -> Int[Tensor, " N"]:
    """Number the different tags from 0, in the order they appear."""
    known: dict[Any, int] = {}
    return torch.tensor([known.setdefault(tag, len(known)) for tag in tags], dtype=torch.int64)


def _of_texts(labels: Int[Tensor, " N"], texts: Int[Tensor, " N"]) -> Tensor | None:
    """Return the label of each text that has tokens, or None if one has several."""
    pairs = torch.unique(torch.stack([texts, labels]), dim=1)
    return pairs[1] if len(torch.unique(pairs[0])) == pairs.shape[1] else None
