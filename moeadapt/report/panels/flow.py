"""Panel 8: from the main expert of a token in one layer to that in the next, as ribbons.

Letters: E experts, G groups of experts that are shown.
"""

from dataclasses import dataclass

from moeadapt.report.data import Flow, ReportData
from moeadapt.report.palette import ShownExperts, short_names, shown_experts, spread
from moeadapt.report.panels.base import Panel
from moeadapt.report.picture import Picture
from moeadapt.report.templating import environment
from moeadapt.report.wording import number, showable

LONGEST_CHAIN, MOST_PAIRS = 8, 5
HEIGHT, GAP, BAR, TOP = 300.0, 3.0, 12.0, 44.0
WIDTH = 900.0
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


def flow_panel(data: ReportData) -> Panel:
    """Make the panel."""
    notes = []
    if not data.flows:
        notes.append("There is one layer, so nothing flows.")
    if len(data.flows) > LONGEST_CHAIN:
        notes.append(
            f"Shown are {MOST_PAIRS} of {len(data.flows)} pairs of consecutive layers, spread over "
            "the depth."
        )
    if data.flows:
        notes.append(f"Ribbons under {number(100 * THINNEST, 1)} % of the tokens are left out.")
    if data.flows and shown_experts(data).has_other:
        notes.append(f"{shown_experts(data).note} The rest is `other`, in grey.")
    return Panel(
        key="flow",
        title="From layer to layer",
        lead="Each token goes from its main expert in one layer to its main expert in the next. The "
        "width of a ribbon is a share of the tokens, its colour the expert it comes from.",
        pictures=[_picture(data)] if data.flows else [],
        notes=notes,
    )


def _chains(flows: list[Flow]) -> list[list[Flow]]:
    """Return what is drawn: all of a short model as one chain, else some pairs by themselves."""
    consecutive = all(b.layer == a.layer + 1 for a, b in zip(flows, flows[1:], strict=False))
    if len(flows) <= LONGEST_CHAIN and consecutive:
        return [flows]
    return [[flows[index]] for index in spread(len(flows), MOST_PAIRS)]


def _picture(data: ReportData) -> Picture:
    experts = shown_experts(data)
    labels = short_names([layer.name for layer in data.layers])
    chains = _chains(data.flows)
    # half a column between chains, so that they do not look joined
    columns = sum(len(chain) for chain in chains) + 0.5 * (len(chains) - 1)
    step = min((WIDTH - BAR - 30) / columns, 240.0)
    bars: list[Bar] = []
    ribbons: list[Ribbon] = []
    heads: list[tuple[float, str]] = []
    x = 15.0
    for chain in chains:
        for flow in chain:
            shares = experts.fold_both(flow.shares)
            bars += _bars(x, [sum(row) for row in shares], experts)
            ribbons += _ribbons(x, x + step, shares, experts)
            heads.append((x, labels[flow.layer]))
            x += step
        last = experts.fold_both(chain[-1].shares)
        bars += _bars(x, [sum(column) for column in zip(*last, strict=True)], experts)
        heads.append((x, labels[chain[-1].layer + 1]))
        x += step / 2
    width = x - step / 2 + BAR + 15
    return Picture(
        name="flow", title="", alt=_sentence(data), svg=_svg(width, bars, ribbons, heads)
    )


def _tops(sizes: list[float]) -> list[float]:
    """Return where each of a stack of bars starts."""
    room = HEIGHT - GAP * (len(sizes) - 1)
    tops, y = [], TOP
    for size in sizes:
        tops.append(y)
        y += size * room + GAP
    return tops


def _bars(x: float, sizes: list[float], experts: ShownExperts) -> list[Bar]:
    room = HEIGHT - GAP * (len(sizes) - 1)
    return [
        Bar(x, top, size * room, color, label)
        for top, size, color, label in zip(
            _tops(sizes), sizes, experts.colors, experts.labels, strict=True
        )
    ]


def _ribbons(
    left: float, right: float, shares: list[list[float]], experts: ShownExperts
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
                ribbons.append(Ribbon(path, experts.colors[i]))
    return ribbons


def _svg(
    width: float, bars: list[Bar], ribbons: list[Ribbon], heads: list[tuple[float, str]]
) -> str:
    text = environment().get_template("flow.svg.j2").render(
        width=width, height=TOP + HEIGHT + 8, bar=BAR, top=TOP, bars=bars, ribbons=ribbons, heads=heads
    )
    return showable(text).strip()


def _sentence(data: ReportData) -> str:
    stay = [sum(flow.shares[e][e] for e in range(data.num_experts)) for flow in data.flows]
    mean = sum(stay) / len(stay)
    return (
        f"Flow of tokens between main experts over {len(data.flows)} steps between layers. On average "
        f"{number(100 * mean, 1)} % keep the number of their expert."
    )
