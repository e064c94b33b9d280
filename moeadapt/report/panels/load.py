"""Panel 3: load of every expert in every layer, as a multiple of the balanced load 1/E."""

import math
from typing import Any

import altair as alt

from moeadapt.report.data import ReportData
from moeadapt.report.palette import (
    OTHER,
    diverging,
    diverging_domain,
    one_size,
    short_names,
    shown_experts,
    spread,
)
from moeadapt.report.panels.base import Panel
from moeadapt.report.picture import Picture, chart_picture, table
from moeadapt.report.verdicts import is_soft
from moeadapt.report.wording import Number, finite, number

MOST_LAYERS, FEW_LAYERS, MOST_COLUMNS = 48, 12, 64
CELLS_WITH_NUMBERS, MOST_NAMES = 8, 16
WIDEST, LIMITS = 544, (1.0, 3.0)
BESIDE = {
    "max_over_mean": "max / mean",
    "cv": "CV",
    "effective_experts": "effective experts",
}
"""Fields of a layer that stand beside its row."""

TIMES = "datum.value < 0 ? '1/' + pow(2, -datum.value) : pow(2, datum.value)"
"""Label of a power of two."""


def load_panel(data: ReportData) -> Panel:
    """Make the panel."""
    shown = spread(len(data.layers), MOST_LAYERS)
    notes = []
    if len(shown) < len(data.layers):
        notes.append(f"Shown are {len(shown)} of {len(data.layers)} layers; the table has all.")
    if data.num_experts > MOST_COLUMNS:
        notes.append(f"{shown_experts(data).note} The column other is the mean of the rest.")
    if one_size(data):
        balanced = f"1/{data.num_experts}"
    else:
        balanced = "1/E"
        notes.append(f"E is the number of experts of the layer, at most {data.num_experts}.")
    if any(is_soft(layer) for layer in data.layers):
        notes.append(
            "Where every token uses every expert the load is even whatever the router does; the "
            "tiles judge its mean probabilities, which are in the table as importance."
        )
    return Panel(
        key="load",
        title="Load of experts",
        lead=f"Share of the used slots that each expert gets, as a multiple of the balanced load "
        f"{balanced}. Without colour: balanced. Orange: more. Blue: less.",
        pictures=[_picture(data, shown)],
        notes=notes,
    )


def _columns(data: ReportData, load: list[float]) -> list[tuple[str, Number]]:
    """Return the name of each column that a layer has and its multiple of 1/E of that layer."""
    size = len(load)
    if data.num_experts <= MOST_COLUMNS:
        return [(str(e), share * size) for e, share in enumerate(load)]
    experts = shown_experts(data)
    own = experts.within(size)
    columns = [(str(e), load[e] * size) for e in own]
    rest = size - len(own)
    return columns + ([("other", experts.fold(load)[-1] * size / rest)] if rest else [])


def _names(data: ReportData) -> list[str]:
    """Return the columns of all layers in order."""
    if data.num_experts <= MOST_COLUMNS:
        return [str(expert) for expert in range(data.num_experts)]
    return shown_experts(data).labels


def _picture(data: ReportData, shown: list[int]) -> Picture:
    labels = short_names([layer.name for layer in data.layers])
    order = [labels[index] for index in shown]
    cells = [
        {
            "layer": labels[index],
            "expert": name,
            "log": max(math.log2(times), -LIMITS[1]) if times > 0 else -LIMITS[1],
            "text": number(times, 1 if times >= 10 else 2),  # noqa: PLR2004 (three digits fit)
        }
        for index in shown
        for name, times in _columns(data, data.layers[index].load)
    ]
    values = [
        {
            "layer": labels[index],
            **{key: getattr(data.layers[index], key) for key in BESIDE},
            **{f"{key} text": number(getattr(data.layers[index], key)) for key in BESIDE},
        }
        for index in shown
    ]
    row = 30 if len(shown) <= FEW_LAYERS else 16
    ends = {"effective_experts": float(data.num_experts)}
    beside = [
        _bars(
            key,
            title,
            ends.get(key, max(finite([v[key] for v in values]), default=1.0)),
            order,
            row,
        )
        for key, title in BESIDE.items()
    ]
    heat = _heat([cell["log"] for cell in cells], _names(data), order, row)
    chart = alt.hconcat(heat, *beside, spacing=26).resolve_scale(y="shared")
    return chart_picture(chart, "load", _sentence(data), {"cells": cells, "layers": values})


def _heat(logs: list[float], names: list[str], order: list[str], row: int) -> Any:
    """Return the heatmap: a row per layer, a column per expert."""
    limit = math.ceil(min(max(LIMITS[0], *map(abs, logs)), LIMITS[1]))
    width = min(WIDEST // len(names), 66)
    every = 1 if len(names) <= MOST_NAMES else 4
    base = alt.Chart(table("cells")).encode(
        x=alt.X(
            "expert:N",
            sort=names,
            title="expert",
            axis=alt.Axis(orient="top", labelAngle=0, grid=False, values=names[::every]),
        ),
        y=alt.Y("layer:N", sort=order, title="layer", axis=alt.Axis(labelLimit=160)),
    )
    color = alt.Color(
        "log:Q",
        scale=alt.Scale(
            domain=diverging_domain(limit), range=diverging(), clamp=True, interpolate="rgb"
        ),
        legend=alt.Legend(
            title="load, multiple of 1/E",
            orient="bottom",
            labelExpr=TIMES,
            titleAnchor="start",
            values=list(range(-limit, limit + 1)),
            gradientLength=320,
        ),
    )
    heat = base.mark_rect(stroke="currentColor", strokeOpacity=0.08).encode(color=color)
    if len(names) <= CELLS_WITH_NUMBERS:
        heat += base.mark_text(fontSize=11, color="currentColor").encode(text="text:N")
    return heat.properties(width=width * len(names), height=alt.Step(row))


def _bars(key: str, title: str, end: Number, order: list[str], row: int) -> Any:
    """Return one number per layer, as a bar from 0 towards `end` with its value."""
    base = alt.Chart(table("layers")).encode(
        x=alt.X(f"{key}:Q", axis=None, scale=alt.Scale(domain=[0, end or 1.0], range=[0, 62])),
        y=alt.Y("layer:N", sort=order, axis=None),
    )
    bar = base.mark_bar(size=min(10, row - 6), color=OTHER, opacity=0.55)
    text = base.mark_text(align="left", dx=5, fontSize=11, color="currentColor")
    return alt.layer(bar, text.encode(text=f"{key} text:N")).properties(
        width=100, height=alt.Step(row), title=title
    )


def _sentence(data: ReportData) -> str:
    worst = max(data.layers, key=lambda layer: layer.max_over_mean)
    experts = f"{'' if one_size(data) else 'up to '}{data.num_experts} experts"
    return (
        f"Load of {experts} in {len(data.layers)} layers. The busiest expert takes "
        f"{number(worst.max_over_mean)} times the balanced load, in {worst.name}."
    )
