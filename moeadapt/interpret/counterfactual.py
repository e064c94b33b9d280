"""What would the same texts cost if tokens were routed otherwise?

Letters: N texts.

Source: the standard error is that of a ratio of two sums over texts, Cochran 1977, "Sampling
Techniques", chapter 6: the text, not the token, is the unit that was drawn.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moeadapt.interpret.losses import TextLosses, as_batches, text_losses
from moeadapt.interpret.scope import active_adapter
from moeadapt.tuner.override import override_routing


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A difference of two losses on the same texts.

    Attributes:
        mean: overridden minus learned, over all tokens, in nats per token; above 0: worse.
        standard_error: of `mean`, over texts; NaN for fewer than two texts.
        texts: texts with a counted token.
    """

    mean: float
    standard_error: float
    texts: int


@dataclass(frozen=True, kw_only=True)
class Counterfactual:
    """Both losses of each text, and what the override changes.

    Attributes:
        learned: mean of each text as the model routes, in nats per token; NaN where a text has no
            counted token.
        overridden: the same under the override.
        tokens: counted tokens of each text.
        difference: over all texts.
        by_domain: over the texts of each labelled domain.
    """

    learned: tuple[float, ...]
    overridden: tuple[float, ...]
    tokens: tuple[int, ...]
    difference: Difference
    by_domain: dict[str, Difference]


def counterfactual(model: nn.Module, batches: Iterable[Any], **override: Any) -> Counterfactual:
    """Measure each text twice, as it is routed and under an override. Costs two passes.

    Args:
        model: the model, in any wrapper.
        batches: what to measure on, see `read_batches`.
        override: arguments of `moeadapt.override_routing`.

    Raises:
        ConfigError: no mixture, or several, are active; the override cannot be; nothing to
            measure on.

    Example:
        >>> counterfactual(model, batches, router="uniform").difference
    """
    active_adapter(model)
    data = as_batches(batches)
    with override_routing(model, **override):
        other = text_losses(model, data)
    own = text_losses(model, data)
    names = sorted({name for name in own.domains if name is not None})
    return Counterfactual(
        learned=tuple((own.nll / own.tokens).tolist()),
        overridden=tuple((other.nll / other.tokens).tolist()),
        tokens=tuple(int(count) for count in own.tokens.tolist()),
        difference=paired_difference(own, other),
        by_domain={
            name: paired_difference(own, other, torch.tensor([d == name for d in own.domains]))
            for name in names
        },
    )


def paired_difference(own: TextLosses, other: TextLosses, rows: Tensor | None = None) -> Difference:
    """Return `other - own` with its standard error; `rows`: bool [N], None: all texts."""
    counted = own.tokens > 0
    if rows is not None:
        counted = counted & rows
    mean, error = ratio((other.nll - own.nll)[counted], own.tokens[counted])
    return Difference(mean=mean, standard_error=error, texts=int(counted.sum()))


def ratio(sums: Float[Tensor, " N"], counts: Float[Tensor, " N"]) -> tuple[float, float]:
    """Return sum(sums) / sum(counts) and its standard error over the N draws."""
    number = len(sums)
    if number == 0:
        return math.nan, math.nan
    mean = sums.sum() / counts.sum()
    if number == 1:
        return float(mean), math.nan
    spread = (sums - mean * counts).square().sum() * number / (number - 1)
    return float(mean), float(spread.sqrt() / counts.sum())
