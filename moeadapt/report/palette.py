"""Colours and names of experts and layers, safe for the colour-blind, on white and on black.

Letters: E experts, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from moeadapt.report.data import ReportData
from moeadapt.report.wording import Number

MOST_EXPERTS = 8
"""Experts with a colour of their own."""

MOST_DOMAINS = 24
"""Domains that a page names; the JSON file has all."""

COLORS = (
    "#e69f00",
    "#56b4e9",
    "#009e73",
    "#cc79a7",
    "#0072b2",
    "#d55e00",
    "#f0e442",
    "currentColor",
)
"""Okabe and Ito, Color Universal Design, 2008; its black is the ink of the page."""

OTHER = "#646972"
"""Every expert without a colour of its own, and whatever is neither high nor low."""

ACCENT = "#2b87c8"
"""What a picture is about; readable on white and on black."""

LOW, HIGH = (0, 114, 178), (213, 94, 0)
STRONGEST, WEAKEST = 0.8, 0.04
"""Opacity at the ends and in the middle; at 0.8 the ink can still be read, in the dark too."""


def diverging() -> list[str]:
    """Return low, middle, middle, high: see-through in the middle, so that it fits any page."""
    ends = [(LOW, STRONGEST), (LOW, WEAKEST), (HIGH, WEAKEST), (HIGH, STRONGEST)]
    return [f"rgba({r}, {g}, {b}, {opacity})" for (r, g, b), opacity in ends]


def diverging_domain(limit: Number) -> list[Number]:
    """Return the values of `diverging`, from -limit to limit."""
    return [-limit, -limit * 1e-6, limit * 1e-6, limit]


def sequential() -> list[str]:
    """Return nothing and much."""
    return diverging()[1::-1]


@dataclass(frozen=True)
class ShownExperts:
    """The experts that a picture shows one by one; the others are one grey group.

    Attributes:
        indices: which, ascending.
        num_experts: E.
    """

    indices: tuple[int, ...]
    num_experts: int

    @property
    def has_other(self) -> bool:
        """Whether some experts are in the grey group."""
        return len(self.indices) < self.num_experts

    @property
    def labels(self) -> list[str]:
        """Names, `other` last if there is any."""
        return [str(index) for index in self.indices] + ["other"] * self.has_other

    @property
    def colors(self) -> list[str]:
        """Colours in the order of `labels`."""
        return [*COLORS[: len(self.indices)], *[OTHER] * self.has_other]

    @property
    def note(self) -> str:
        """A sentence that says what is left out, or nothing."""
        if not self.has_other:
            return ""
        return (
            f"Shown are the {len(self.indices)} most loaded of {self.num_experts} experts; the "
            "JSON file holds all."
        )

    def within(self, num_experts: int) -> list[int]:
        """Return those of `indices` that a layer of `num_experts` experts has."""
        return [index for index in self.indices if index < num_experts]

    def position(self, expert: int) -> int:
        """Return where an expert is in `labels`."""
        return self.indices.index(expert) if expert in self.indices else len(self.indices)

    def fold(self, values: Sequence[Number]) -> list[Number]:
        """Add up a row into the groups of `labels`.

        Args:
            values: one per expert of a layer, which may have fewer than E.
        """
        own = [values[index] if index < len(values) else 0.0 for index in self.indices]
        return own + [sum(values) - sum(own)] * self.has_other

    def fold_both(self, matrix: Sequence[Sequence[Number]]) -> list[list[Number]]:
        """Add up a matrix [E of a layer][E of the next] in both directions."""
        columns = [self.fold(column) for column in zip(*map(self.fold, matrix), strict=True)]
        return [list(row) for row in zip(*columns, strict=True)]


def shown_experts(data: ReportData) -> ShownExperts:
    """Choose the experts with the largest load over all layers, eight at most."""
    every = zip_longest(*(layer.load for layer in data.layers), fillvalue=0.0)
    total = [sum(loads) for loads in every]
    most = sorted(range(data.num_experts), key=lambda expert: (-total[expert], expert))
    return ShownExperts(tuple(sorted(most[:MOST_EXPERTS])), data.num_experts)


def one_size(data: ReportData) -> bool:
    """Return whether all layers have the same number of experts."""
    return len({len(layer.load) for layer in data.layers}) == 1


def spread(count: int, most: int) -> list[int]:
    """Choose at most `most` of `count` indices, evenly, the first and the last among them.

    Example:
        >>> spread(30, 4)
        [0, 10, 19, 29]
    """
    if count <= most:
        return list(range(count))
    return [round(step * (count - 1) / (most - 1)) for step in range(most)]


def short_names(names: Sequence[str]) -> list[str]:
    """Drop the parts of paths that all names share at the start and at the end.

    A name without others to compare keeps its last three parts.

    Example:
        >>> short_names(["model.layers.0.mlp", "model.layers.1.mlp"])
        ['0', '1']
    """
    parts = [name.split(".") for name in names]
    if len(set(names)) < len(names):
        return [f"{index} {name}" for index, name in enumerate(names)]
    if len(parts) == 1:
        return [".".join(parts[0][-3:])]
    start = end = 0
    shortest = min(map(len, parts))
    while start < shortest - 1 and len({path[start] for path in parts}) == 1:
        start += 1
    while start + end < shortest - 1 and len({path[-1 - end] for path in parts}) == 1:
        end += 1
    return [".".join(path[start : len(path) - end]) for path in parts]
