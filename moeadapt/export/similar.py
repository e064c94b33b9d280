"""Which experts of a router are alike: cosines of their deltas, by Gram matrices."""

from collections.abc import Sequence
from typing import Any

import torch

from moeadapt.export.bank_layout import expert_pair
from moeadapt.export.low_rank import inner, stack, truncate
from moeadapt.export.rebuild import Sources
from moeadapt.tuner.layer import MoeLoraLinear
from moeadapt.tuner.plain import Pair


def group_similar(
    layers: Sequence[MoeLoraLinear], adapter: str, amounts: Sequence[float], left: int
) -> list[Sources]:
    """Return `left` groups of experts, the most similar ones together.

    Args:
        layers: the target linears of one router.
        adapter: which adapter.
        amounts: how much each expert counts in the mean of its group, >= 0: its mean routing
            weight, or 1 for all; a group of zeros counts evenly.
        left: how many groups, >= 1.

    Returns:
        Each group's experts with their weights in its mean, which add up to 1.
    """
    groups: list[list[int]] = [[e] for e in range(len(amounts))]
    banks = [layer.moe_banks[adapter] for layer in layers]
    while len(groups) > left:
        members = [_shares(group, amounts) for group in groups]
        deltas = [[_mean_pair(bank, one) for one in members] for bank in banks]
        best = max(
            ((_cosine(deltas, i, j), -i, -j) for i in range(len(groups)) for j in range(i)),
        )
        first, second = sorted((-best[1], -best[2]))
        groups[first] = sorted(groups[first] + groups.pop(second))
    return [_shares(group, amounts) for group in groups]


def _shares(group: Sequence[int], amounts: Sequence[float]) -> Sources:
    if len(group) == 1:
        return ((group[0], 1.0),)
    total = sum(amounts[e] for e in group)
    if total == 0:
        return tuple((e, 1 / len(group)) for e in group)
    return tuple((e, amounts[e] / total) for e in group)


def _mean_pair(bank: Any, sources: Sources) -> Pair:
    pairs = stack([expert_pair(bank, e) for e, _ in sources], [w for _, w in sources])
    return truncate(pairs, bank.size.all_ranks[sources[0][0]])


def _cosine(deltas: Sequence[Sequence[Pair]], i: int, j: int) -> float:
    dots = [sum(inner(one[a], one[b]) for one in deltas) for a, b in ((i, j), (i, i), (j, j))]
    return dots[0] / max((dots[1] * dots[2]) ** 0.5, torch.finfo(torch.float64).tiny)
