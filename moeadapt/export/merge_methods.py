"""How one dense delta is made of the routed experts of a linear: the methods of `moeadapt.merge`.

Letters: D in, O out, E experts, R gated ranks.

Source: `least_squares` is ridge regression of what the mixture adds on what the linear reads.
`sum`, `mean`, `top_k` and `svd` gather knowledge as Xue et al. 2022 (OneS),
https://arxiv.org/abs/2201.10890, section 3 (summation, averaging, Top-KG, SVD-KG). We differ: there
the experts are whole FFNs and the kept parts are hidden units and singular vectors of their
matrices; here both are rank-one terms of low-rank deltas, an equal number of each expert.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from moeadapt.errors import ConfigError
from moeadapt.experts import ExpertBank
from moeadapt.export.bank_layout import routed_pairs
from moeadapt.export.low_rank import shrink, singular, stack, truncate
from moeadapt.export.residual import Moments
from moeadapt.registry import ComponentConfig, Registry
from moeadapt.tuner.plain import Pair


@dataclass(frozen=True, kw_only=True)
class Linear:
    """One target linear of a mixture: what a method looks at to merge its experts.

    Attributes:
        key: its path, for messages.
        bank: its experts.
        moments: what it does on data; None: there is none.
        rank: largest rank of the result; None: that of all routed experts together.
    """

    key: str
    bank: ExpertBank
    moments: Moments | None = None
    rank: int | None = None

    @property
    def limit(self) -> int:
        """Return the largest rank of the result."""
        size = self.bank.size
        total = sum(size.all_ranks[: size.num_experts])
        return min(self.rank or total, total, size.in_features, size.out_features)


class MergeConfig(ComponentConfig, ABC):
    """Settings of one method.

    Attributes:
        needs_data: whether it looks at what the mixture does on data.
    """

    needs_data: ClassVar[bool] = False

    @abstractmethod
    def routed(self, linear: Linear) -> Pair:
        """Return the delta that stands for the routed experts of `linear`.

        Raises:
            ConfigError: data is needed and there is none, or a setting does not fit `linear`.
        """


class LeastSquaresConfig(MergeConfig):
    """The delta that is nearest to the mixture on the data: E[d x^T] (E[x x^T] + lambda I)^-1.

    With a smaller rank, the nearest delta of that rank (reduced-rank regression).

    Attributes:
        ridge: lambda over the mean square of an input, > 0; larger: nearer to no adapter.
    """

    needs_data: ClassVar = True

    ridge: Annotated[float, Field(gt=0.0)] = 1e-4

    def routed(self, linear: Linear) -> Pair:
        """See `MergeConfig.routed`."""
        moments = _moments(linear)
        dim = moments.x_x.shape[0]
        size = moments.x_x.diagonal().mean()
        # Inputs that are all zero have no delta to find.
        damping = self.ridge * torch.where(size > 0, size, torch.ones_like(size))
        identity = torch.eye(dim, dtype=moments.x_x.dtype, device=moments.x_x.device)
        root = torch.linalg.cholesky(moments.x_x + damping * identity)
        found_RD = torch.cholesky_solve(moments.g_x.T, root).T
        used = found_RD.abs().sum(1) > 0
        pair = Pair(a=found_RD[used], b=moments.up[:, used])
        if pair.rank > linear.limit:
            return _nearest(pair, moments, linear.limit)
        return pair if pair.rank else Pair(a=found_RD[:1], b=moments.up[:, :1])


def _nearest(pair: Pair, moments: Moments, rank: int) -> Pair:
    """Return the `rank` directions of the output in which `pair` does most on the data."""
    left_OR, down_RR = torch.linalg.qr(pair.b)
    seen_RD = down_RR @ pair.a
    _, vectors = torch.linalg.eigh(seen_RD @ moments.x_x @ seen_RD.T)
    best_Rr = vectors[:, -rank:]
    return Pair(a=best_Rr.T @ seen_RD, b=left_OR @ best_Rr)


class UsageConfig(MergeConfig):
    """The experts times their mean routing weight; exact where the weights are constant."""

    needs_data: ClassVar = True

    def routed(self, linear: Linear) -> Pair:
        """See `MergeConfig.routed`."""
        return _average(linear, _moments(linear).weights.tolist())


class UniformConfig(MergeConfig):
    """The plain mean of the experts."""

    def routed(self, linear: Linear) -> Pair:
        """See `MergeConfig.routed`."""
        experts = linear.bank.size.num_experts
        return _average(linear, [1 / experts] * experts)


class MeanConfig(UniformConfig):
    """The plain mean of the experts, under OneS's name for it: averaging."""


class SingleConfig(MergeConfig):
    """One expert with weight 1, the others dropped.

    Attributes:
        expert: which one, 0 to num_experts - 1; None: the one with the largest mean routing weight
            on the data, in each layer.
    """

    expert: Annotated[int, Field(ge=0)] | None = None

    def routed(self, linear: Linear) -> Pair:
        """See `MergeConfig.routed`."""
        pairs = routed_pairs(linear.bank)
        chosen = self.expert
        if chosen is None:
            if linear.moments is None:
                raise ConfigError("method 'single' needs expert=, or data to find the most used")
            chosen = int(linear.moments.weights.argmax())
        if chosen >= len(pairs):
            raise ConfigError(
                f"method 'single': expert={chosen}, but {linear.key!r} has the experts "
                f"0..{len(pairs) - 1}"
            )
        return truncate(pairs[chosen], linear.limit)


class SumConfig(MergeConfig):
    """The experts added up; OneS's summation."""

    def routed(self, linear: Linear) -> Pair:
        """See `MergeConfig.routed`."""
        return _average(linear, [1.0] * linear.bank.size.num_experts)


class TopKConfig(MergeConfig):
    """The longest rank-one terms of each expert side by side: as large as one expert."""

    def routed(self, linear: Linear) -> Pair:
        """See `MergeConfig.routed`."""
        parts = []
        for pair, rank in zip(routed_pairs(linear.bank), _shares(linear), strict=True):
            length = pair.a.norm(dim=1) * pair.b.norm(dim=0)
            kept = length.argsort(descending=True, stable=True)[:rank].sort().values
            parts.append(Pair(a=pair.a[kept], b=pair.b[:, kept]))
        return stack(parts)


class SvdConfig(MergeConfig):
    """The largest singular directions of each expert side by side: as large as one expert."""

    def routed(self, linear: Linear) -> Pair:
        """See `MergeConfig.routed`."""
        pairs = routed_pairs(linear.bank)
        parts = []
        for pair, rank in zip(pairs, _shares(linear), strict=True):
            u, s, vh = singular(pair)
            parts.append(Pair(a=vh[:rank], b=u[:, :rank] * s[:rank]))
        return stack(parts)


def _moments(linear: Linear) -> Moments:
    if linear.moments is None:
        raise ConfigError("this method looks at what the mixture does: give data=")
    return linear.moments


def _average(linear: Linear, weights: Sequence[float]) -> Pair:
    pair = stack(routed_pairs(linear.bank), weights)
    # Experts that share a factor repeat it once stacked.
    limit = linear.limit
    common = linear.bank.factor("lora_A").weight.shape[0] < pair.rank
    common = common or linear.bank.factor("lora_B").weight.shape[1] < pair.rank
    return truncate(shrink(pair) if common else pair, limit)


def _shares(linear: Linear) -> list[int]:
    """Divide the rank of the result among the experts, the first ones get what is left over."""
    size = linear.bank.size
    experts = size.num_experts
    ranks = size.all_ranks[:experts]
    total = linear.rank or max(max(ranks), experts)
    if total < experts:
        raise ConfigError(
            f"rank={total} is less than the {experts} experts of {linear.key!r}, each of which "
            f"gives at least one rank; use rank >= {experts}"
        )
    shares = [total // experts + (e < total % experts) for e in range(experts)]
    return [min(share, rank) for share, rank in zip(shares, ranks, strict=True)]


MERGES: Registry[Any] = Registry(
    "merge method",
    {
        "least_squares": LeastSquaresConfig,
        "usage": UsageConfig,
        "uniform": UniformConfig,
        "single": SingleConfig,
        "sum": SumConfig,
        "mean": MeanConfig,
        "top_k": TopKConfig,
        "svd": SvdConfig,
    },
)

MENU = ("least_squares", "usage", "uniform", "single")
"""The methods that a merge reports for comparison."""

DENSIFY = ("sum", "mean", "top_k", "svd")
"""The methods of `moeadapt.densify`."""
