"""Panel 6: which domains use which experts, and how many bits that tells, against chance."""

import math
from typing import Any

import altair as alt

from moeadapt.report.adjust import LEVEL, adjusted
from moeadapt.report.data import Layer, ReportData
from moeadapt.report.palette import (
    ACCENT,
    HIGH,
    LOW,
    MOST_DOMAINS,
    OTHER,
    short_names,
    shown_experts,
    spread,
)
from moeadapt.report.panels.base import Panel
from moeadapt.report.picture import Picture, chart_picture, table
from moeadapt.report.verdicts import smallest_p
from moeadapt.report.wording import number

MOST_LAYERS, MOST_BARS, COLUMNS = 6, 48, 3
STRONGEST = 2.0
"""log2 of the lift where colour and size end."""

TIMES = (
    "datum.value < 0 ? '1/' + pow(2, -datum.value) + ' \N{MULTIPLICATION SIGN}' : "
    "pow(2, datum.value) + ' \N{MULTIPLICATION SIGN}'"
)


def domains_panel(data: ReportData) -> Panel:
    """Make the panel."""
    measured = len(data.domains) > 1 and all(layer.lift for layer in data.layers)
    notes = []
    if not measured:
        notes.append("Domains were not compared: that takes texts of at least two.")
    else:
        notes += [shown_experts(data).note] if shown_experts(data).has_other else []
        if len(data.domains) > MOST_DOMAINS:
            notes.append(
                f"Lift: the {MOST_DOMAINS} of {len(data.domains)} domains with the most texts."
            )
        if len(data.layers) > MOST_LAYERS:
            notes.append(
                f"Lift: {MOST_LAYERS} of {len(data.layers)} layers, spread over the depth."
            )
        if len(data.layers) > MOST_BARS:
            notes.append(f"Mutual information: {MOST_BARS} of {len(data.layers)} layers.")
        notes += _out_of_reach(data)
    return Panel(
        key="domains",
        title="Domains and experts",
        lead="Lift: how much oftener a domain uses an expert than all tokens do. A filled mark is "
        f"unlikely by chance (p at most {LEVEL}, permuting the domains of the texts, adjusted by "
        "Benjamini and Hochberg for all domains and experts of a layer; mutual information for all "
        "layers); a hollow one could be chance.",
        pictures=[_lift(data), _information(data)] if measured else [],
        notes=notes,
    )


def _lift(data: ReportData) -> Picture:
    labels = short_names([layer.name for layer in data.layers])
    layers = spread(len(data.layers), MOST_LAYERS)
    shown = shown_experts(data)
    experts = shown.indices
    sure = _sure(data)
    domains = _domains(data)
    cells = [
        {
            "layer": f"layer {labels[index]}",
            "domain": name,
            "expert": str(expert),
            "log": _log_lift(data.layers[index], row, expert),
            "strength": abs(_log_lift(data.layers[index], row, expert)),
            "sure": (index, row, expert) in sure,
        }
        for index in layers
        for row, name in domains
        for expert in shown.within(len(data.layers[index].load))
    ]
    base = _lift_marks([str(expert) for expert in experts], [name for _, name in domains])
    marks = alt.layer(
        base.transform_filter("datum.sure").mark_point(filled=True, opacity=1, strokeWidth=1.6),
        base.transform_filter("!datum.sure").mark_point(filled=False, opacity=1, strokeWidth=1.6),
        data=table(),
    ).properties(width=alt.Step(29), height=alt.Step(29))
    order = [f"layer {labels[index]}" for index in layers]
    header = alt.Header(labelAnchor="start")
    chart = marks.facet(
        facet=alt.Facet("layer:N", sort=order, title=None, header=header),
        columns=COLUMNS,
        spacing=22,
    )
    best = max(cells, key=lambda cell: cell["log"])
    filled = sum(cell["sure"] for cell in cells)
    sentence = (
        f"Lift of {len(domains)} domains on {len(experts)} experts in {len(layers)} layers. "
        f"The largest is {number(2 ** best['log'])} times, {best['domain']} on expert "
        f"{best['expert']} in {best['layer']}; {filled} of {len(cells)} are unlikely by chance."
    )
    return chart_picture(chart, "lift", sentence, {"rows": cells}, title="Lift by layer")


def _domains(data: ReportData) -> list[tuple[int, str]]:
    """Return the domains that are shown, by their place among all."""
    order = sorted(range(len(data.domains)), key=lambda row: -data.texts_per_domain[row])
    return [(row, data.domains[row]) for row in sorted(order[:MOST_DOMAINS])]


def _sure(data: ReportData) -> set[tuple[int, int, int]]:
    """Return (layer, domain, expert) of every lift that is unlikely by chance.

    Adjusted within a layer: no p is below what the permutations can give, and over hundreds of
    layers even a domain with an expert of its own would not stand out.
    """
    found = set()
    for index, layer in enumerate(data.layers):
        places = [(row, e) for row, own in enumerate(layer.p_value) for e in range(len(own))]
        values = adjusted([p for own in layer.p_value for p in own])
        found |= {(index, *place) for place, p in zip(places, values, strict=True) if p <= LEVEL}
    return found


def _out_of_reach(data: ReportData) -> list[str]:
    """Say where one test alone, as unlikely as the permutations can show, would stay hollow."""
    notes, least = [], 1 / (data.permutations + 1)
    cells = [[p for row in layer.p_value for p in row] for layer in data.layers]
    # Two-sided, so that twice the least is as low as they go.
    if any(2 * least * len(own) > LEVEL and min(adjusted(own)) > LEVEL for own in cells):
        notes.append(
            "Lift: so many domains and experts were tested at once in a layer that with "
            f"{data.permutations} permutations none of them alone can be told from chance."
        )
    chances = [layer.mutual_information_p for layer in data.layers]
    least = max(least, smallest_p(data.texts_per_domain))
    if len(chances) > 1 and least * len(chances) > LEVEL and min(adjusted(chances)) > LEVEL:
        notes.append(
            f"Mutual information: {len(chances)} layers were tested at once, and with "
            f"{data.permutations} permutations of {sum(data.texts_per_domain)} texts none of them "
            "alone can be told from chance."
        )
    return notes


def _lift_marks(experts: list[str], domains: list[str]) -> Any:
    """Return a chart whose colour and size are the lift, without its marks."""
    colors = alt.Scale(
        domain=[-STRONGEST, 0, STRONGEST],
        clamp=True,
        interpolate="rgb",
        range=[f"rgb{LOW}", OTHER, f"rgb{HIGH}"],
    )
    sizes = alt.Scale(domain=[0, STRONGEST], range=[30, 300], clamp=True)
    legend = alt.Legend(
        title="lift", orient="right", labelExpr=TIMES, values=[-2, -1, 0, 1, 2], symbolOpacity=1
    )
    return alt.Chart().encode(
        x=alt.X("expert:N", sort=experts, title="expert", axis=alt.Axis(labelAngle=0, grid=True)),
        y=alt.Y("domain:N", sort=domains, title=None, axis=alt.Axis(labelLimit=120)),
        size=alt.Size("strength:Q", legend=None, scale=sizes),
        color=alt.Color("log:Q", scale=colors, legend=legend),
    )


def _log_lift(layer: Layer, row: int, expert: int) -> float:
    lift = layer.lift[row][expert]
    if not math.isfinite(lift):
        return 0.0
    return math.log2(max(lift, 2.0 ** -(2 * STRONGEST)))


def _information(data: ReportData) -> Picture:
    labels = short_names([layer.name for layer in data.layers])
    shown = spread(len(data.layers), MOST_BARS)
    chances = adjusted([layer.mutual_information_p for layer in data.layers])
    rows = [
        {
            "layer": labels[index],
            "bits": data.layers[index].mutual_information,
            "null": data.layers[index].mutual_information_null,
            "sure": chances[index] <= LEVEL,
        }
        for index in shown
    ]
    angle = 0 if len(shown) <= 16 else -60  # noqa: PLR2004 (more labels collide)
    x = alt.X(
        "layer:N",
        sort=[labels[index] for index in shown],
        title="layer",
        axis=alt.Axis(labelAngle=angle, labelLimit=90, grid=False),
    )
    y = alt.Y("bits:Q", title="mutual information (bits)", axis=alt.Axis(tickCount=5))
    base = alt.Chart(table())
    chance = alt.Color(
        "kind:N",
        title=None,
        scale=alt.Scale(domain=["measured", "by chance"], range=[ACCENT, OTHER]),
        legend=alt.Legend(orient="right", symbolOpacity=1, offset=14),
    )
    marks = alt.layer(
        base.mark_rule(strokeWidth=2, color=ACCENT, opacity=0.35).encode(
            x=x, y=alt.Y("null:Q"), y2="bits:Q"
        ),
        base.transform_calculate(kind="'by chance'")
        .mark_tick(thickness=2.5, size=18, opacity=1)
        .encode(x=x, y=alt.Y("null:Q"), color=chance),
        base.transform_calculate(kind="'measured'")
        .transform_filter("datum.sure")
        .mark_point(filled=True, size=90, opacity=1)
        .encode(x=x, y=y, color=chance),
        base.transform_calculate(kind="'measured'")
        .transform_filter("!datum.sure")
        .mark_point(filled=False, size=80, strokeWidth=2, opacity=1)
        .encode(x=x, y=y, color=chance),
    )
    width = min(max(len(shown) * 90, 200), 790)
    best = max(data.layers, key=lambda layer: layer.mutual_information)
    sentence = (
        f"Mutual information between domain and main expert per layer. The largest is "
        f"{number(best.mutual_information, 3)} bits in {best.name}, where chance gives "
        f"{number(best.mutual_information_null, 3)}."
    )
    return chart_picture(
        marks.properties(width=width, height=170),
        "mutual_information",
        sentence,
        {"rows": rows},
        title="Mutual information between domain and main expert",
    )
