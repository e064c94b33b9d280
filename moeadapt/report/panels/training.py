"""Panel 5: entropy, load and aux loss over the training, as they were logged."""

import altair as alt

from moeadapt.report.data import ReportData, TrainingPoint
from moeadapt.report.panels.base import Panel
from moeadapt.report.picture import Picture, chart_picture, rows
from moeadapt.report.wording import finite, number

SERIES = {
    "moe/entropy": "entropy, share of log E",
    "moe/load_max": "load, max / mean",
    "moe/aux_loss": "aux loss",
}
"""Metrics of `moeadapt.training.metrics` and what they are called here."""


def training_panel(data: ReportData) -> Panel:
    """Make the panel."""
    found = [key for key in SERIES if any(key in point.values for point in data.training)]
    missing = [SERIES[key] for key in SERIES if key not in found]
    if not data.training:
        notes = ["No training log was found, so there is nothing to draw."]
    elif missing:
        notes = [f"Not in the training log: {'; '.join(missing)}."]
    else:
        notes = []
    return Panel(
        key="training",
        title="Over the training",
        lead="Means over the routers at each logged step. Entropy: 1 is undecided, 0 is certain. "
        "Load: 1 is balance.",
        pictures=[_picture(data.training, found)] if found else [],
        notes=notes,
    )


def _picture(points: list[TrainingPoint], found: list[str]) -> Picture:
    charts = []
    for key in found:
        logged = [
            {"step": point.step, "value": point.values[key]}
            for point in points
            if key in point.values
        ]
        base = alt.Chart(rows(logged)).encode(
            x=alt.X("step:Q", title="step", axis=alt.Axis(tickCount=4, grid=False)),
            y=alt.Y("value:Q", title=None, axis=alt.Axis(tickCount=4), scale=alt.Scale(zero=False)),
        )
        line = base.mark_line(color="#0072b2", strokeWidth=2, interpolate="linear")
        last = alt.Chart(rows(logged[-1:])).encode(x="step:Q", y="value:Q")
        dot = last.mark_point(filled=True, size=50, color="#0072b2", opacity=1)
        charts.append(
            alt.layer(line, dot).properties(width=245, height=150, title=SERIES[key])
        )
    return chart_picture(alt.hconcat(*charts, spacing=34), "training", _sentence(points, found))


def _sentence(points: list[TrainingPoint], found: list[str]) -> str:
    parts = []
    for key in found:
        values = finite([point.values.get(key) for point in points])
        if values:
            parts.append(f"{SERIES[key]} from {number(values[0])} to {number(values[-1])}")
    return f"Over {len(points)} logged steps: {'; '.join(parts)}."
