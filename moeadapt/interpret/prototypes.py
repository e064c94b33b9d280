"""Which tokens does an expert take with the largest weight, and what stands around them?"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from moeadapt.errors import ConfigError
from moeadapt.interpret.losses import as_batches
from moeadapt.interpret.observe import Observed, observe
from moeadapt.interpret.scope import choose_experts, choose_layers
from moeadapt.tuner.probe import Batch, read_batches


@dataclass(frozen=True, kw_only=True)
class Prototype:
    """A token that an expert takes.

    Attributes:
        weight: its routing weight.
        text: index of its text.
        position: which token of that text it is, counted from 0, padding left out.
        token_id: its vocabulary id.
        token: its text.
        before: text of the tokens before it.
        after: text of the tokens after it.
    """

    weight: float
    text: int
    position: int
    token_id: int
    token: str
    before: str
    after: str


def prototypes(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[Any],
    per_expert: int = 5,
    *,
    layers: Sequence[str] | None = None,
    experts: Sequence[int] | None = None,
    context: int = 8,
    batch_size: int = 8,
    max_length: int = 1024,
) -> dict[str, dict[int, tuple[Prototype, ...]]]:
    """List each expert's tokens with the largest weights. One pass over the texts.

    Special tokens are left out. Of equal weights the earlier text and token comes first.

    Args:
        model: the model, in any wrapper.
        tokenizer: of the model, with a padding token.
        texts: to look for tokens in; or batches, see `read_batches`.
        per_expert: how many, at least 1; fewer come back where an expert takes fewer.
        layers: layers or blocks, named as by `collect_routing`; None: all.
        experts: which ones; None: all.
        context: tokens shown on either side, at least 0.
        batch_size: texts per forward; batches stay as they are.
        max_length: tokens of a text, the rest is cut; batches stay as they are.

    Returns:
        Layer or block -> expert -> its tokens, the largest weight first.

    Raises:
        ConfigError: no mixture, or several, are active; no such layer or expert; no texts, or a
            tokenizer without a padding token; a count that is too small.
        UnsupportedError: a layer does not route these tokens one by one.

    Example:
        >>> prototypes(model, tokenizer, texts)["model.layers.0.mlp"][0][0].token
    """
    chosen = choose_experts(choose_layers(model, layers), experts)
    if per_expert < 1 or context < 0:
        raise ConfigError(f"per_expert={per_expert} must be 1 or more, context={context} 0 or more")
    items: list[Any] = [texts] if isinstance(texts, str) else list(texts)
    if any(isinstance(item, str) for item in items):
        data = read_batches(
            items, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length
        )
    else:
        data = as_batches(items)
    seen = _observe(model, tokenizer, data, chosen, per_expert)
    found: dict[str, dict[int, tuple[Prototype, ...]]] = {}
    for name, own in chosen.items():
        found[name] = {}
        for expert in own:
            best = _best(seen, name, expert, per_expert)
            found[name][expert] = tuple(
                _prototype(seen, tokenizer, index, weight, context) for index, weight in best
            )
    return found


def _observe(
    model: nn.Module,
    tokenizer: Any,
    data: Sequence[Batch],
    chosen: Mapping[str, Sequence[int]],
    number: int,
) -> Observed:
    """Keep, of each batch, layer and expert, the tokens that may be among the best of all."""
    special = torch.tensor(sorted(getattr(tokenizer, "all_special_ids", [])), dtype=torch.int64)

    def keep(layer: str, weights: Tensor, ids: Tensor) -> dict[int, list[tuple[int, float]]]:
        allowed = weights.masked_fill(torch.isin(ids, special).unsqueeze(1), 0)
        return {expert: _largest(allowed[:, expert], number) for expert in chosen[layer]}

    return observe(model, data, list(chosen), keep)


def _best(seen: Observed, layer: str, expert: int, number: int) -> list[tuple[int, float]]:
    """Return place and weight of an expert's best tokens of all batches."""
    starts = [0, *accumulate(seen.sizes)]
    every = [
        (start + index, weight)
        for start, kept in zip(starts, seen.kept[layer], strict=False)
        for index, weight in kept[expert]
    ]
    return sorted(every, key=lambda one: (-one[1], one[0]))[:number]


def _largest(weights: Tensor, number: int) -> list[tuple[int, float]]:
    """Return place and size of the largest weights above 0, earlier ones first among equals."""
    number = min(number, len(weights))
    if not number:
        return []
    # topk alone picks any of equal ones.
    least = weights.topk(number).values[-1]
    places = torch.cat(
        [torch.nonzero(weights > least), torch.nonzero(weights == least)[:number]]
    ).flatten()
    order = torch.argsort(weights[places], descending=True, stable=True)[:number]
    return [(int(i), float(weights[i])) for i in places[order] if weights[i] > 0]


def _prototype(
    seen: Observed, tokenizer: Any, index: int, weight: float, context: int
) -> Prototype:
    text = int(seen.texts[index])
    # Tokens of one text lie side by side.
    own = torch.nonzero(seen.texts == text).flatten()
    first, last = int(own[0]), int(own[-1])
    before = seen.token_ids[max(first, index - context) : index]
    after = seen.token_ids[index + 1 : min(last, index + context) + 1]
    token_id = int(seen.token_ids[index])
    return Prototype(
        weight=weight,
        text=text,
        position=int(seen.positions[index]),
        token_id=token_id,
        token=tokenizer.decode([token_id]),
        before=tokenizer.decode(before.tolist()),
        after=tokenizer.decode(after.tolist()),
    )
