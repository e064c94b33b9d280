"""What is each expert's fair share of what all of them achieve together?

Players are experts, a coalition S is the model in which only the experts of S keep their weights
and all others have weight 0 (nothing is renormalised), and its value is minus the loss.

Source: Shapley 1953, "A Value for n-Person Games"; sampling of permutations: Castro, Gomez and
Tejada 2009, "Polynomial calculation of the Shapley value based on sampling".
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import nn

from moeadapt.errors import ConfigError
from moeadapt.interpret.losses import as_batches, text_losses
from moeadapt.interpret.scope import choose_layers, only_at, without
from moeadapt.tuner.override import override_routing

Value = Callable[[frozenset[int]], float]

EXACT_UP_TO = 8
"""Experts; more have over 256 coalitions, and permutations are sampled."""

MOST_EXACT = 16
"""Experts above which exact values are refused: 2^16 are 65536 passes over the batches."""


@dataclass(frozen=True, kw_only=True)
class Shapley:
    """Shapley values in nats per token; above 0: the expert lowers the loss.

    Attributes:
        values: one per expert; they sum to `all_on - all_off`.
        standard_errors: of sampling permutations (not of the texts); None: the values are exact.
        all_on: value of all experts, minus the loss in nats per token.
        all_off: value of no expert.
        coalitions: how many different ones were measured, a pass over the batches each.
    """

    values: tuple[float, ...]
    standard_errors: tuple[float, ...] | None
    all_on: float
    all_off: float
    coalitions: int


def shapley(
    model: nn.Module,
    batches: Iterable[Any],
    layer: str | None = None,
    samples: int = 64,
    seed: int = 0,
    exact: bool | None = None,
) -> Shapley:
    """Share the mixture's gain among its experts.

    Exact values cost 2^E passes over the batches; sampled ones at most `samples` * (E - 1) + 2,
    fewer where coalitions repeat.

    Args:
        model: the model, in any wrapper.
        batches: what to measure on, see `read_batches`.
        layer: the layer or block whose experts play, the others stay as they are; None: expert e
            of all layers is one player.
        samples: permutations, where values are not exact; at least 2.
        seed: of the permutations.
        exact: None: exact up to 8 experts. True is refused above 16.

    Raises:
        ConfigError: no mixture, or several, are active; no such layer; fewer than two samples;
            exact values of too many experts; nothing to measure on.

    Example:
        >>> shapley(model, batches).values
    """
    sizes = choose_layers(model, None if layer is None else [layer])
    number = max(sizes.values())
    exact = number <= EXACT_UP_TO if exact is None else exact
    _check(exact, number, samples)
    data = as_batches(batches)
    measured: dict[frozenset[int], float] = {}

    def value(coalition: frozenset[int]) -> float:
        if coalition not in measured:
            off = without([e for e in range(number) if e not in coalition])
            with override_routing(model, edit=only_at(sizes, off)):
                measured[coalition] = -text_losses(model, data).mean
        return measured[coalition]

    errors = None
    if exact:
        values = exact_values(value, number)
    else:
        generator = torch.Generator().manual_seed(seed)
        orders = [torch.randperm(number, generator=generator).tolist() for _ in range(samples)]
        values, errors = sampled_values(value, orders)
    return Shapley(
        values=values,
        standard_errors=errors,
        all_on=value(frozenset(range(number))),
        all_off=value(frozenset()),
        coalitions=len(measured),
    )


def _check(exact: bool, number: int, samples: int) -> None:
    if exact and number > MOST_EXACT:
        raise ConfigError(
            f"exact=True takes 2^{number} passes over the batches for {number} experts; it is for "
            f"{MOST_EXACT} at most. Leave it out to sample permutations, or choose fewer experts "
            "with layer="
        )
    if not exact and samples < 2:  # noqa: PLR2004
        raise ConfigError(f"samples={samples} must be 2 or more permutations")


def exact_values(value: Value, players: int) -> tuple[float, ...]:
    """Return every player's mean contribution over all orders, by the sum over coalitions."""
    shares = []
    for player in range(players):
        others = [other for other in range(players) if other != player]
        share = 0.0
        for size in range(players):
            weight = 1 / (players * math.comb(players - 1, size))
            for coalition in map(frozenset, combinations(others, size)):
                share += weight * (value(coalition | {player}) - value(coalition))
        shares.append(share)
    return tuple(shares)


def sampled_values(
    value: Value, orders: Sequence[Sequence[int]]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return every player's mean contribution over the given orders, and its standard error."""
    gains = torch.zeros(len(orders), len(orders[0]), dtype=torch.float64)
    for row, order in enumerate(orders):
        joined: frozenset[int] = frozenset()
        for player in order:
            gains[row, player] = value(joined | {player}) - value(joined)
            joined |= {player}
    errors = gains.std(0) / math.sqrt(len(orders))
    return tuple(gains.mean(0).tolist()), tuple(errors.tolist())
