"""Panel 8: from the main expert of a token in one layer to that in the next, as ribbons.

Letters: E experts, G groups of experts that are shown.
"""

from dataclasses import dataclass
from itertools import pairwise

from moeadapt.report.data import Flow, ReportData
from moeadapt.report.palette import ShownExperts, short_names, shown_experts, spread
from moeadapt.report.panels.base import Panel
from moeadapt.report.picture import Picture
from moeadapt.report.templating import environment
from moeadapt.report.wording import Number, number, showable

LONGEST_CHAIN, MOST_PAIRS = 8, 5
HEIGHT, GAP, BAR, TOP = 300.0, 3.0, 12.0, 44.0
WIDTH, LEFT, RIGHT, WIDEST = 960.0, 40.0, 50.0, 240.0
CLEAR, FAINT = 0.4, 0.18
"""Opacity of ribbons of an expert, and of the grey group."""

THINNEST = 0.004
"""Share of the tokens below which a ribbon is left out."""


@dataclass(frozen=True)
class Bar:
    """One expert in one layer: a rectangle."""

    x: float
    y: float
    height: float
    color: str
    label: str


@dataclass(frozen=True)
class Ribbon:
    """Tokens between two bars: an outline."""

    path: str
    color: str
    opacity: float


def flow_panel(data: ReportData) -> Panel:
    """Make the panel."""
    return Panel(
        key="flow",
        title="From layer to layer",
        lead="Each token goes from its main expert in one layer to its main expert in the next. "
        "The width of a ribbon is a share of the tokens, its colour the expert it comes from.",
        pictures=[_picture(data)] if data.flows else [],
        notes=_notes(data),
    )


def _notes(data: ReportData) -> list[str]:
    if not data.flows:
        return ["There is one layer, so nothing flows."]
    experts = shown_experts(data)
    drawn = sum(len(chain) for chain in _chains(data.flows, experts))
    notes = []
    if drawn < len(data.flows):
        notes.append(
            f"Shown are {drawn} of {len(data.flows)} pairs of consecutive layers, spread over the "
            "depth."
        )
    if experts.has_other:
        away = [experts.fold_both(flow.shares)[-1][-1] for flow in data.flows]
        mean = number(100 * sum(away) / len(away), 1)
        notes.append(
            f"{experts.note} The rest is grey. Tokens with the rest in both layers, {mean} % on "
            "average, are left out."
        )
    return [*notes, f"Ribbons under {number(100 * THINNEST, 1)} % are left out."]


def _chains(flows: list[Flow], experts: ShownExperts) -> list[list[Flow]]:
    """Return what is drawn: all of a short model as one chain, else some pairs by themselves."""
    consecutive = all(b.layer == a.layer + 1 for a, b in pairwise(flows))
    if len(flows) <= LONGEST_CHAIN and consecutive and not experts.has_other:
        return [flows]
    return [[flows[index]] for index in spread(len(flows), MOST_PAIRS)]


def _shares(flow: Flow, experts: ShownExperts) -> list[list[Number]]:
    """Return [G][G] shares that sum to one, without those from the grey group to itself."""
    shares = experts.fold_both(flow.shares)
    if experts.has_other:
        # Most tokens of many experts would be one grey block that presses the rest together.
        shares[-1][-1] = 0.0
    total = sum(map(sum, shares))
    return [[share / total if total > 0 else 0.0 for share in row] for row in shares]


def _picture(data: ReportData) -> Picture:
    experts = shown_experts(data)
    labels = short_names([layer.name for layer in data.layers])
    chains = _chains(data.flows, experts)
    # half a column between chains, so that they do not look joined
    columns = sum(len(chain) for chain in chains) + 0.5 * (len(chains) - 1)
    step = min((WIDTH - LEFT - RIGHT) / columns, WIDEST)
    bars: list[Bar] = []
    ribbons: list[Ribbon] = []
    heads: list[tuple[float, str]] = []
    x = LEFT
    for chain in chains:
        for flow in chain:
            shares = _shares(flow, experts)
            bars += _bars(x, [sum(row) for row in shares], experts)
            ribbons += _ribbons(x, x + step, shares, experts)
            heads.append((x, labels[flow.layer]))
            x += step
        last = _shares(chain[-1], experts)
        bars += _bars(x, [sum(column) for column in zip(*last, strict=True)], experts)
        heads.append((x, labels[chain[-1].layer + 1]))
        x += step / 2
    svg = _svg(x - step / 2 + RIGHT, bars, ribbons, heads)
    return Picture(name="flow", title="", alt=_sentence(data), svg=svg)


def _tops(sizes: list[Number]) -> list[Number]:
    """Return where each of a stack of bars starts."""
    room = HEIGHT - GAP * (len(sizes) - 1)
    tops, y = [], TOP
    for size in sizes:
        tops.append(y)
        y += size * room + GAP
    return tops


def _bars(x: float, sizes: list[Number], experts: ShownExperts) -> list[Bar]:
    room = HEIGHT - GAP * (len(sizes) - 1)
    return [
        Bar(x, top, size * room, color, label)
        for top, size, color, label in zip(
            _tops(sizes), sizes, experts.colors, experts.labels, strict=True
        )
    ]


def _ribbons(
    left: float, right: float, shares: list[list[Number]], experts: ShownExperts
) -> list[Ribbon]:
    """Draw [G][G] shares between a column of bars and the next."""
    room = HEIGHT - GAP * (len(shares) - 1)
    starts = _tops([sum(row) for row in shares])
    ends = _tops([sum(column) for column in zip(*shares, strict=True)])
    x0, x1 = left + BAR, right
    middle = (x0 + x1) / 2
    ribbons = []
    for i, row in enumerate(shares):
        for j, share in enumerate(row):
            a, b, tall = starts[i], ends[j], share * room
            starts[i] += tall
            ends[j] += tall
            if share >= THINNEST:
                path = (
                    f"M{x0:.1f},{a:.1f}C{middle:.1f},{a:.1f} {middle:.1f},{b:.1f} {x1:.1f},{b:.1f}"
                    f"V{b + tall:.1f}C{middle:.1f},{b + tall:.1f} {middle:.1f},{a + tall:.1f} "
                    f"{x0:.1f},{a + tall:.1f}Z"
                )
                ribbons.append(
                    Ribbon(path, experts.colors[i], FAINT if i == len(experts.indices) else CLEAR)
                )
    return ribbons


def _svg(
    width: float, bars: list[Bar], ribbons: list[Ribbon], heads: list[tuple[float, str]]
) -> str:
    text = (
        environment()
        .get_template("flow.svg.j2")
        .render(
            width=width,
            height=TOP + HEIGHT + 8,
            bar=BAR,
            top=TOP,
            bars=bars,
            ribbons=ribbons,
            heads=heads,
        )
    )
    return showable(text).strip()


def _sentence(data: ReportData) -> str:
    # A flow has a row per expert of its layer and a column per expert of the next.
    stay = [sum(row[e] for e, row in enumerate(flow.shares) if e < len(row)) for flow in data.flows]
    mean = sum(stay) / len(stay)
    return (
        f"Flow of tokens between main experts over {len(data.flows)} steps between layers. On "
        f"average {number(100 * mean, 1)} % keep the number of their expert."
    )
