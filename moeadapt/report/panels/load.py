"""Panel 3: load of every expert in every layer, as a multiple of the balanced load 1/E."""

import math

import altair as alt

from moeadapt.report.data import ReportData
from moeadapt.report.palette import diverging, diverging_domain, short_names, shown_experts, spread
from moeadapt.report.panels.base import Panel
from moeadapt.report.picture import Picture, chart_picture, rows
from moeadapt.report.wording import number

MOST_LAYERS, MOST_COLUMNS = 48, 64
CELLS_WITH_NUMBERS = 8
WIDEST, LIMITS = 480, (1.0, 3.0)
TIMES = (
    "datum.value < 0 ? '1/' + pow(2, -datum.value) + ' \N{MULTIPLICATION SIGN}' : "
    "pow(2, datum.value) + ' \N{MULTIPLICATION SIGN}'"
)
"""Label of a power of two."""


def load_panel(data: ReportData) -> Panel:
    """Make the panel."""
    shown = spread(len(data.layers), MOST_LAYERS)
    notes = []
    if len(shown) < len(data.layers):
        notes.append(f"Shown are {len(shown)} of {len(data.layers)} layers; the table has all.")
    if data.num_experts > MOST_COLUMNS:
        notes.append(f"{shown_experts(data).note} Column `other`: mean of the rest.")
    return Panel(
        key="load",
        title="Load of the experts",
        lead=f"Share of the used slots that each expert gets, as a multiple of the balanced load "
        f"1/{data.num_experts}. Without colour: balanced. Orange: more. Blue: less.",
        pictures=[_picture(data, shown)],
        notes=notes,
    )


def _columns(data: ReportData, load: list[float]) -> list[tuple[str, float]]:
    """Return the name of each column and its multiple of 1/E."""
    if data.num_experts <= MOST_COLUMNS:
        return [(str(e), share * data.num_experts) for e, share in enumerate(load)]
    experts = shown_experts(data)
    rest = data.num_experts - len(experts.indices)
    sizes = [1] * len(experts.indices) + [rest]
    return [
        (label, share * data.num_experts / size)
        for label, share, size in zip(experts.labels, experts.fold(load), sizes, strict=True)
    ]


def _picture(data: ReportData, shown: list[int]) -> Picture:
    labels = short_names([layer.name for layer in data.layers])
    cells = [
        {
            "layer": labels[index],
            "expert": name,
            "times": times,
            "log": max(math.log2(times), -LIMITS[1]) if times > 0 else -LIMITS[1],
            "text": number(times, 1 if times >= 10 else 2),  # noqa: PLR2004 (three digits fit)
        }
        for index in shown
        for name, times in _columns(data, data.layers[index].load)
    ]
    limit = min(max(LIMITS[0], *(abs(cell["log"]) for cell in cells)), LIMITS[1])
    limit = float(math.ceil(limit))
    names = list(dict.fromkeys(cell["expert"] for cell in cells))
    height, width = 30 if len(shown) <= 12 else 16, min(WIDEST // len(names), 60)  # noqa: PLR2004
    order = [labels[index] for index in shown]
    y = alt.Y("layer:N", sort=order, title="layer", axis=alt.Axis(labelLimit=160))
    base = alt.Chart(rows(cells)).encode(
        x=alt.X(
            "expert:N", sort=names, title="expert",
            axis=alt.Axis(orient="top", labelAngle=0, labelOverlap=True, grid=False),
        ),
        y=y,
    )
    color = alt.Color(
        "log:Q",
        scale=alt.Scale(domain=diverging_domain(limit), range=diverging(), clamp=True),
        legend=alt.Legend(
            title="load, multiple of 1/E", orient="bottom", labelExpr=TIMES, titleAnchor="start",
            values=list(range(-int(limit), int(limit) + 1)), gradientLength=240,
        ),
    )
    heat = base.mark_rect(
        stroke="currentColor", strokeOpacity=0.08, cornerRadius=2 if width > 20 else 0  # noqa: PLR2004
    ).encode(color=color)
    if len(names) <= CELLS_WITH_NUMBERS:
        heat += base.mark_text(fontSize=11, color="currentColor").encode(text="text:N")
    heat = heat.properties(width=width * len(names), height=alt.Step(height))
    side = [
        _column(data, shown, labels, key, title, height)
        for key, title in (
            ("max_over_mean", "max / mean"), ("cv", "CV"), ("effective_experts", "effective experts")
        )
    ]
    chart = alt.hconcat(heat, *side, spacing=26).resolve_scale(y="shared")
    return chart_picture(chart, "load", _sentence(data))


def _column(
    data: ReportData, shown: list[int], labels: list[str], key: str, title: str, height: int
) -> alt.LayerChart:
    """Return one number per layer, as a bar with its value."""
    values = [float(getattr(data.layers[index], key)) for index in shown]
    table = rows(
        [
            {"layer": labels[index], "value": value, "text": number(value), "zero": 0}
            for index, value in zip(shown, values, strict=True)
        ]
    )
    most = max([value for value in values if math.isfinite(value)], default=1.0)
    y = alt.Y("layer:N", sort=[labels[index] for index in shown], axis=None)
    scale = alt.Scale(domain=[0, 1.0 * most or 1.0], range=[0, 62])
    x = alt.X("value:Q", axis=None, scale=scale)
    base = alt.Chart(table).encode(y=y)
    bar = base.mark_bar(size=min(10, height - 6), color="#8a8f98", opacity=0.55, cornerRadiusEnd=2)
    text = base.mark_text(align="left", dx=5, fontSize=11, color="currentColor")
    return alt.layer(bar.encode(x=x), text.encode(x=x, text="text:N")).properties(
        width=100, height=alt.Step(height), title=title
    )


def _sentence(data: ReportData) -> str:
    worst = max(data.layers, key=lambda layer: layer.max_over_mean)
    return (
        f"Load of {data.num_experts} experts in {len(data.layers)} layers. The busiest expert takes "
        f"{number(worst.max_over_mean)} times the balanced load, in {worst.name}."
    )
