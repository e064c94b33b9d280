"""A picture: SVG for the page, SVG and PNG as files of their own."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import altair as alt
import vl_convert

from moeadapt.report.wording import all_showable, rounded, showable

INK = "#1b1f24"
"""Text colour of the files; on the page it is that of the text around."""

FONT = "Helvetica, Arial, Liberation Sans, sans-serif"
PNG_SCALE = 2

Tables = Mapping[str, Sequence[Mapping[str, Any]]]

TAG = re.compile(r"<[a-zA-Z][^>]*>")
LONG_NUMBER = re.compile(r"(\d\.\d\d)\d+")
ID = re.compile(r'\bid="([^"]+)"')
REFERENCE = re.compile(r'(\bid="|url\(#|href="#)([^")]+)')
NAMESPACE = re.compile(r'\sxmlns(?::\w+)?="[^"]*"')
ROLE = re.compile(r'\s(?:role|aria-\w+|class)="[^"]*"')


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture.

    Attributes:
        name: of its files; one of `panels.PICTURE_NAMES`.
        title: a heading above it; empty: the panel has one picture and says it.
        alt: a sentence with the main number, for those who do not see it.
        svg: an `<svg>` element without its description; its ink is `currentColor`.
    """

    name: str
    title: str
    alt: str
    svg: str

    @property
    def inline(self) -> str:
        """The element for an HTML page: names of its own, and no namespace, which HTML knows."""
        # The renderer counts on from chart to chart; counted anew, the same data is the same page.
        names = {old: f"{self.name}-{index}" for index, old in enumerate(ID.findall(self.svg))}
        svg = NAMESPACE.sub("", self.svg, count=2)
        return TAG.sub(lambda tag: REFERENCE.sub(lambda use: use[1] + names[use[2]], tag[0]), svg)

    @property
    def standalone(self) -> str:
        """The text of an SVG file: dark ink on white, with its description."""
        background = '<rect width="100%" height="100%" fill="#fff"/>'
        head, body = self.svg.split(">", 1)
        told = f"<title>{escape(showable(self.alt))}</title>"
        return f'{head} role="img" color="{INK}">{told}{background}{body}'

    def png(self) -> bytes:
        """Draw the PNG file."""
        return vl_convert.svg_to_png(self.standalone, scale=PNG_SCALE)


def chart_picture(chart: Any, name: str, alt_text: str, tables: Tables, title: str = "") -> Picture:
    """Draw an Altair chart.

    Args:
        chart: a chart without configuration.
        name: see `Picture.name`.
        alt_text: see `Picture.alt`.
        tables: what its `table` names stand for.
        title: see `Picture.title`.
    """
    spec = _configured(chart).to_dict(validate=False)
    # Rows are added here since Altair copies what it is given, cell by cell, many times.
    spec["datasets"] = {key: rounded(rows) for key, rows in tables.items()}
    # The renderer ends the whole process at a control character.
    svg = vl_convert.vegalite_to_svg(json.dumps(all_showable(spec), ensure_ascii=False))
    svg = TAG.sub(lambda tag: ROLE.sub("", LONG_NUMBER.sub(r"\1", tag[0])), showable(svg))
    return Picture(name=name, title=title, alt=alt_text, svg=svg)


def table(name: str = "rows") -> Any:
    """Return a name for the rows of a chart."""
    return alt.NamedData(name=name)


def _configured(chart: Any) -> Any:
    """Set one look: no frame, faint grid, the ink of the page."""
    ink = {"labelColor": "currentColor", "titleColor": "currentColor"}
    return (
        chart.configure(background="transparent", font=FONT, padding=2)
        .configure_view(stroke=None)
        .configure_axis(
            **ink,
            labelFontSize=11,
            titleFontSize=11,
            titleFontWeight="normal",
            labelOpacity=0.85,
            titleOpacity=0.7,
            titlePadding=8,
            domain=False,
            ticks=False,
            labelPadding=6,
            gridColor="currentColor",
            gridOpacity=0.12,
        )
        .configure_title(
            color="currentColor", fontSize=12, fontWeight="normal", anchor="start", offset=8
        )
        .configure_header(**ink, labelFontSize=12, titleFontSize=11, labelPadding=4, labelLimit=180)
        .configure_legend(
            **ink,
            labelFontSize=11,
            titleFontSize=11,
            titleFontWeight="normal",
            titleOpacity=0.7,
            titleLimit=240,
            gradientThickness=10,
            gradientLength=120,
        )
    )
