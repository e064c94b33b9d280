"""Panel 2: held-out loss of every way of routing, and its difference to the learned one."""

import altair as alt

from moeadapt.report.arms import MOST_SINGLE
from moeadapt.report.data import Arm, Layer, ReportData
from moeadapt.report.palette import ACCENT
from moeadapt.report.panels.base import Panel
from moeadapt.report.picture import Picture, chart_picture, table
from moeadapt.report.verdicts import ROUNDING
from moeadapt.report.wording import interval, number

LEARNED = "learned"
STEP = 34


def worth_panel(data: ReportData) -> Panel:
    """Make the panel."""
    table = [
        {
            "name": arm.name,
            "nll": number(arm.nll, 3),
            "interval": interval(arm.nll_low, arm.nll_high),
            "difference": "" if arm.name == LEARNED else number(arm.difference, 3, sign=True),
            "difference_interval": ""
            if arm.name == LEARNED
            else interval(arm.difference_low, arm.difference_high, sign=True),
            "reading": _reading(arm),
        }
        for arm in data.arms
    ]
    return Panel(
        key="worth",
        title="Is routing worth it?",
        lead="Loss on held-out texts, in nats per token, with the same weights and the routing "
        "replaced; every token of a text counts but the first, prompts too (moeadapt eval counts "
        "answers only). Lower is better; bars are 95 % intervals over texts. The differences are "
        "taken text by text, so they can be clear where the bars overlap.",
        template="worth.html.j2",
        values={"arms": table},
        pictures=[_picture(data.arms)] if data.arms else [],
        notes=_notes(data),
    )


def _notes(data: ReportData) -> list[str]:
    if not data.arms:
        return ["No other way of routing was measured."]
    tried, all_ = min(MOST_SINGLE, *map(_num_experts, data.layers)), data.num_experts
    return [f"Of {all_} experts the first {tried} were tried alone."] if tried < all_ else []


def _num_experts(layer: Layer) -> int:
    return len(layer.load)


def _reading(arm: Arm) -> str:
    if arm.name == LEARNED:
        return "the reference"
    if arm.difference_low > ROUNDING:
        return "worse than learned"
    if arm.difference_high < -ROUNDING:
        return "better than learned"
    return "no clear difference"


def _picture(arms: list[Arm]) -> Picture:
    names = [arm.name for arm in arms]
    rows = [
        {
            "arm": arm.name,
            "nll": arm.nll,
            "low": arm.nll_low,
            "high": arm.nll_high,
            "value": number(arm.nll, 3),
            "learned": arm.name == LEARNED,
        }
        for arm in arms
    ]
    y = alt.Y("arm:N", sort=names, title=None, axis=alt.Axis(labelLimit=180, labelFontSize=12))
    color = alt.condition("datum.learned", alt.value(ACCENT), alt.value("currentColor"))
    scale = alt.Scale(zero=False, padding=36)
    axis = alt.Axis(tickCount=8, labelFlush=False)
    x = alt.X("nll:Q", title="held-out loss (nats per token)", scale=scale, axis=axis)
    base = alt.Chart(table())
    layers = [
        base.transform_filter("datum.learned")
        .mark_rule(strokeDash=[4, 4], opacity=0.8, color=ACCENT)
        .encode(x=x),
        base.mark_rule(strokeWidth=2.5, strokeCap="round", opacity=0.75).encode(
            x=alt.X("low:Q"), x2="high:Q", y=y, color=color
        ),
        base.mark_point(filled=True, size=90, opacity=1).encode(x=x, y=y, color=color),
        base.mark_text(align="left", dx=9, fontSize=11).encode(
            x=alt.X("high:Q"), y=y, text="value:N", color=color
        ),
    ]
    chart = alt.layer(*layers).properties(width=820, height=alt.Step(STEP))
    return chart_picture(chart, "worth", _sentence(arms), {"rows": rows})


def _sentence(arms: list[Arm]) -> str:
    start = f"Held-out loss under {len(arms)} ways of routing. "
    start += f"{arms[0].name}: {number(arms[0].nll, 3)} nats per token"
    others = [f"{arm.name} {number(arm.nll, 3)}" for arm in arms[1:]]
    return f"{start}; {', '.join(others)}." if others else f"{start}."
