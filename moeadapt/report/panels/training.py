"""Panel 5: entropy, load and aux loss over the training, as they were logged."""

from typing import Any

import altair as alt

from moeadapt.report.data import ReportData, TrainingPoint
from moeadapt.report.palette import ACCENT, spread
from moeadapt.report.panels.base import Panel
from moeadapt.report.picture import Picture, chart_picture, table
from moeadapt.report.wording import finite, number

SERIES = {
    "moe/entropy": "entropy, share of log E",
    "moe/load_max": "load, max / mean",
    "moe/aux_loss": "aux loss",
}
"""Metrics of `moeadapt.training.metrics` and what they are called here."""

MOST_POINTS = 500
"""Logged steps that a line has; a chart is 256 wide."""


def training_panel(data: ReportData) -> Panel:
    """Make the panel."""
    points = [data.training[index] for index in spread(len(data.training), MOST_POINTS)]
    found = [key for key in SERIES if any(key in point.values for point in points)]
    missing = [SERIES[key] for key in SERIES if key not in found]
    if not data.training:
        notes = ["No training log was found, so there is nothing to draw."]
    elif missing:
        notes = [f"Not in the training log: {'; '.join(missing)}."]
    else:
        notes = []
    if len(points) < len(data.training):
        notes.append(f"Drawn are {len(points)} of {len(data.training)} logged steps.")
    return Panel(
        key="training",
        title="Over the training",
        lead="Means over the routers at each logged step. Entropy: 1 is undecided, 0 is certain. "
        "Load: 1 is balance.",
        pictures=[_picture(points, found)] if found else [],
        notes=notes,
    )


def _picture(points: list[TrainingPoint], found: list[str]) -> Picture:
    charts = []
    tables: dict[str, list[dict[str, Any]]] = {"one": [{}]}
    for key in found:
        tables[key] = [
            {"step": point.step, "value": point.values[key]}
            for point in points
            if key in point.values
        ]
        base = alt.Chart(table(key)).encode(
            x=alt.X("step:Q", title="step", axis=alt.Axis(tickCount=4, grid=False)),
            y=alt.Y("value:Q", title=None, axis=alt.Axis(tickCount=4), scale=alt.Scale(zero=False)),
        )
        line = base.mark_line(color=ACCENT, strokeWidth=2, interpolate="linear")
        tables[f"last {key}"] = tables[key][-1:]
        last = alt.Chart(table(f"last {key}")).encode(x="step:Q", y="value:Q")
        dot = last.mark_point(filled=True, size=50, color=ACCENT, opacity=1)
        # A mark, not a title: titles move with the labels of the axis, and then do not line up.
        head = alt.Chart(table("one")).mark_text(
            text=SERIES[key], x=0, y=-20, align="left", fontSize=12, color="currentColor"
        )
        charts.append(alt.layer(line, dot, head).properties(width=256, height=150))
    return chart_picture(
        alt.hconcat(*charts, spacing=34), "training", _sentence(points, found), tables
    )


def _sentence(points: list[TrainingPoint], found: list[str]) -> str:
    parts = []
    for key in found:
        values = finite([point.values.get(key) for point in points])
        if values:
            parts.append(f"{SERIES[key]} from {number(values[0])} to {number(values[-1])}")
    return f"Over {len(points)} logged steps: {'; '.join(parts)}."
