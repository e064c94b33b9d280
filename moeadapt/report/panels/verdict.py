"""Panel 1: four answers, each with its number and its reason."""

from moeadapt.report.data import ReportData
from moeadapt.report.panels.base import Panel
from moeadapt.report.wording import short_number

SIGNS = {"yes": "\N{CHECK MARK}", "no": "\N{MULTIPLICATION X}"}


def verdict_panel(data: ReportData) -> Panel:
    """Make the tiles."""
    tiles = [
        {
            "name": tile.name,
            "answer": tile.answer,
            "kind": tile.answer if tile.answer in SIGNS else "unclear",
            "sign": SIGNS.get(tile.answer, "?"),
            "value": short_number(tile.value),
            "unit": tile.unit,
            "reason": tile.reason,
        }
        for tile in data.verdicts
    ]
    return Panel(
        key="verdict",
        title="Verdict",
        template="verdict.html.j2",
        values={"tiles": tiles},
        notes=() if tiles else ("Nothing was judged.",),
    )
