"""How much one label says about another, and how much of that chance alone would say.

Letters: N tokens, A values of a label.

Source: plug-in estimate of the mutual information, biased upwards by about (A - 1)(B - 1) /
(2 N log 2) bits (Miller 1955), hence the permutations; (1 + hits) / (1 + permutations): Phipson
and Smyth 2010, https://arxiv.org/abs/1603.05766; adjusting for chance: Vinh, Epps and Bailey 2010.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from moeadapt.errors import ConfigError

_ROUNDING = 1e-9
"""Bits: a permutation that gives the same table may differ by the order of a sum."""


@dataclass(frozen=True, kw_only=True)
class Information:
    """Mutual information of a label and the main expert.

    Attributes:
        bits: measured, 0 to the smaller of both entropies.
        null_bits: mean over permutations, what chance says.
        p_value: share of permutations, the data itself counted in, that say at least as much.
        expert_entropy: of the main expert, in bits.
        label_entropy: of the label, in bits.
        tokens: tokens it is measured on.
    """

    bits: float
    null_bits: float
    p_value: float
    expert_entropy: float
    label_entropy: float
    tokens: int


def entropy_bits(values: Tensor) -> float:
    """Return the entropy of the empirical distribution of `values` [N], numbers from 0, in bits."""
    share = torch.bincount(values).double() / len(values)
    return float(torch.special.entr(share).sum()) / math.log(2)


def mutual_information(a: Int[Tensor, " N"], b: Int[Tensor, " N"]) -> float:
    """Return I(a; b) in bits by H(a) + H(b) - H(a, b), at least 0."""
    return _shared(entropy_bits(a), entropy_bits(b), a, b)


def _shared(bits_a: float, bits_b: float, a: Tensor, b: Tensor) -> float:
    return max(bits_a + bits_b - entropy_bits(a * (int(b.max()) + 1) + b), 0.0)


def compare_with_chance(
    labels: Int[Tensor, " N"],
    experts: dict[str, Int[Tensor, " N"]],
    shuffle: Callable[[torch.Generator], Int[Tensor, " N"]],
    permutations: int,
    seed: int,
) -> dict[str, Information]:
    """Measure every layer against the same permutations.

    Args:
        labels: label of each token, numbers from 0.
        experts: layer -> main expert of each token.
        shuffle: returns the labels permuted by a generator.
        permutations: how many.
        seed: of the permutations.

    Raises:
        ConfigError: fewer than one permutation, or no token.
    """
    if permutations < 1:
        raise ConfigError(f"permutations={permutations} must be at least 1")
    if not len(labels):
        raise ConfigError("there is no token to measure on")
    generator = torch.Generator().manual_seed(seed)
    whole, of_labels = {n: entropy_bits(own) for n, own in experts.items()}, entropy_bits(labels)
    measured = {n: _shared(of_labels, whole[n], labels, own) for n, own in experts.items()}
    null: dict[str, list[float]] = {name: [] for name in experts}
    for _ in range(permutations):
        other = shuffle(generator)
        # Texts of different lengths that trade their labels change how often each label is.
        bits = entropy_bits(other)
        for name, own in experts.items():
            null[name].append(_shared(bits, whole[name], other, own))
    return {
        name: Information(
            bits=measured[name],
            null_bits=sum(null[name]) / permutations,
            p_value=_p_value(measured[name], null[name]),
            expert_entropy=whole[name],
            label_entropy=of_labels,
            tokens=len(labels),
        )
        for name in experts
    }


def shuffled(values: Int[Tensor, " N"]) -> Callable[[torch.Generator], Int[Tensor, " N"]]:
    """Return what permutes `values`."""
    return lambda generator: values[torch.randperm(len(values), generator=generator)]


def _p_value(measured: float, null: Sequence[float]) -> float:
    hits = sum(value >= measured - _ROUNDING for value in null)
    return (1 + hits) / (1 + len(null))
