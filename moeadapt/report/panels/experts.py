"""Panel 7: which experts change the model alike, and which are used together."""

import math
from typing import Any

import altair as alt

from moeadapt.report.data import Layer, ReportData
from moeadapt.report.palette import (
    diverging,
    diverging_domain,
    sequential,
    short_names,
    shown_experts,
    spread,
)
from moeadapt.report.panels.base import Panel
from moeadapt.report.picture import Picture, chart_picture, table
from moeadapt.report.wording import finite, number

MOST_LAYERS = 6
CELL = 15

Cells = list[dict[str, Any]]


def experts_panel(data: ReportData) -> Panel:
    """Make the panel."""
    notes = [shown_experts(data).note] if shown_experts(data).has_other else []
    if len(data.layers) > MOST_LAYERS:
        notes.append(
            f"Shown are {MOST_LAYERS} of {len(data.layers)} layers, spread over the depth."
        )
    pictures = []
    if data.num_experts < 2:  # noqa: PLR2004 (a pair takes two)
        notes.append("There is one expert, so there are no pairs.")
    else:
        if any(layer.similarity is not None for layer in data.layers):
            pictures.append(_similarity(data))
        else:
            notes.append("Similarity: experts of this kind hold no weight change to compare.")
        pictures.append(_coactivation(data))
        if _largest(_cells(data, "coactivation"))[0] == 0:
            notes.append("No token uses two of the experts shown at once.")
    return Panel(
        key="experts",
        title="Pairs of experts",
        lead="Similarity: cosine between the weight changes of two experts; 1 is the same "
        "direction, 0 is unrelated. Used together: share of the tokens that use both.",
        pictures=pictures,
        notes=notes,
    )


def _matrix(layer: Layer, which: str) -> list[list[float]] | None:
    return layer.similarity if which == "similarity" else layer.coactivation


def _cells(data: ReportData, which: str) -> Cells:
    """Return the pairs shown, without a value on the diagonal."""
    labels = short_names([layer.name for layer in data.layers])
    shown = shown_experts(data)
    return [
        {
            "layer": f"layer {labels[index]}",
            "row": str(row),
            "column": str(column),
            "value": None if row == column else matrix[row][column],
        }
        for index in spread(len(data.layers), MOST_LAYERS)
        if (matrix := _matrix(data.layers[index], which)) is not None
        for row in shown.within(len(matrix))
        for column in shown.within(len(matrix))
    ]


def _largest(cells: Cells) -> tuple[float, str]:
    """Return the largest value, and where it is."""
    best = (-math.inf, "")
    for cell in cells:
        if finite([cell["value"]]) and cell["value"] > best[0]:
            where = f"experts {cell['row']} and {cell['column']} in {cell['layer']}"
            best = (float(cell["value"]), where)
    return best


def _grid(data: ReportData, cells: Cells, color: alt.Color) -> Any:
    experts = [str(expert) for expert in shown_experts(data).indices]
    axis = alt.Axis(labelAngle=0, grid=False, labelFontSize=10, labelPadding=3)
    return (
        alt.Chart(table())
        .mark_rect(stroke="currentColor", strokeOpacity=0.1)
        .encode(
            x=alt.X("column:N", sort=experts, title=None, axis=axis),
            y=alt.Y("row:N", sort=experts, title=None, axis=axis),
            color=color,
        )
        .properties(width=alt.Step(CELL), height=alt.Step(CELL))
        .facet(
            facet=alt.Facet(
                "layer:N",
                sort=list(dict.fromkeys(str(cell["layer"]) for cell in cells)),
                title=None,
                header=alt.Header(labelAnchor="start", labelFontSize=11),
            ),
            columns=MOST_LAYERS,
            spacing=14,
        )
    )


def _similarity(data: ReportData) -> Picture:
    cells = _cells(data, "similarity")
    limit = max([0.1, *map(abs, finite([cell["value"] for cell in cells]))])
    color = alt.Color(
        "value:Q",
        scale=alt.Scale(
            domain=diverging_domain(limit), range=diverging(), clamp=True, interpolate="rgb"
        ),
        legend=_legend("cosine", "+.2f"),
    )
    most, where = _largest(cells)
    sentence = (
        f"Cosine between the weight changes of experts. The largest is {number(most)}: {where}."
    )
    return chart_picture(
        _grid(data, cells, color),
        "similarity",
        sentence,
        {"rows": cells},
        title="Similarity of weight changes",
    )


def _coactivation(data: ReportData) -> Picture:
    cells = _cells(data, "coactivation")
    most, where = _largest(cells)
    limit = most if math.isfinite(most) and most > 0 else 1.0
    color = alt.Color(
        "value:Q",
        scale=alt.Scale(domain=[0, limit], range=sequential(), clamp=True, interpolate="rgb"),
        legend=_legend("share of tokens", ".0%" if limit >= 0.05 else ".1%"),  # noqa: PLR2004
    )
    sentence = f"Tokens that use two experts at once. The most: {number(100 * most, 1)} %, {where}."
    return chart_picture(
        _grid(data, cells, color), "coactivation", sentence, {"rows": cells}, title="Used together"
    )


def _legend(title: str, form: str) -> alt.Legend:
    return alt.Legend(
        title=title, orient="right", format=form, gradientLength=90, tickCount=4, offset=14
    )
