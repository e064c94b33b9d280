"""The rows of the CSV file and the tables on the screen."""

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.speed.goals import judged
from benchmarks.speed.measure import Measured

SIZES = ("tokens", "width", "out", "ffn", "layers", "experts", "rank", "k", "dtype")
MOST_TABLES = 6
"""Up to this many linears have a table each; more are one table with a line each."""


def rows_of(measured: Measured) -> list[dict[str, Any]]:
    """Return one row per form, without the columns that say where it was measured."""
    rows = []
    for form in measured.seconds:
        middle, low, high = measured.ratio(form, measured.baseline)
        times = measured.ratio(form, measured.ours)[0] if measured.ours else ""
        rows.append(
            {
                "benchmark": measured.benchmark,
                "work": measured.work,
                "form": form,
                **{name: measured.sizes.get(name, "") for name in SIZES},
                "baseline": measured.baseline,
                "ratio": _rounded(middle),
                "ratio_low": _rounded(low),
                "ratio_high": _rounded(high),
                "ours": measured.ours,
                "times_ours": _rounded(times),
                "ms": _rounded(measured.milliseconds(form)),
                "saved_units": _rounded(measured.saved.get(form, "")),
                "peak_units": _rounded(measured.peak.get(form, "")),
                "unit": measured.unit,
                "rounds": measured.rounds,
            }
        )
    return rows


def _rounded(value: Any) -> Any:
    return round(value, 3) if isinstance(value, float) else value


def show(results: list[Measured], header: str, console: Console) -> None:
    """Print every measurement and the goals."""
    console.print(header, highlight=False)
    linears = [measured for measured in results if measured.benchmark == "linear"]
    many = len(linears) > MOST_TABLES
    if many:
        for work in dict.fromkeys(measured.work for measured in linears):
            cells = [measured for measured in linears if measured.work == work]
            _show_cells(cells, console)
    for measured in results:
        # With many cells in lines, a table of its own only for those that were timed well.
        well = measured.rounds == max(m.rounds for m in linears) if many else True
        if measured.benchmark != "linear" or well:
            _show_one(measured, console)
    _show_goals(results, console)


def _text(sizes: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in sizes.items())


def _show_one(measured: Measured, console: Console) -> None:
    where = f"{measured.benchmark}, {measured.work}: {_text(measured.sizes)}"
    console.print(f"\n{where}, {measured.rounds} turns", highlight=False)
    shown: dict[str, Callable[[dict[str, Any]], str]] = {
        "form": lambda row: row["form"],
        f"time / {measured.baseline}": lambda row: f"{row['ratio']:.2f}",
        "quartiles": lambda row: f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}",
    }
    if measured.ours:
        shown[f"/ {measured.ours}"] = lambda row: f"{row['times_ours']:.2f}"
    shown["ms"] = lambda row: f"{row['ms']:.3g}" if row["ms"] < 100 else f"{row['ms']:.0f}"
    if measured.saved:
        shown[f"saved, {measured.unit}"] = lambda row: f"{row['saved_units']:.2f}"
    if measured.peak:
        shown[f"peak, {measured.unit.split()[0]}"] = lambda row: f"{row['peak_units']:.2f}"
    table = Table()
    for column in shown:
        table.add_column(column, justify="left" if column == "form" else "right")
    for row in rows_of(measured):
        table.add_row(*(cell(row) for cell in shown.values()))
    console.print(table)


def _show_cells(cells: list[Measured], console: Console) -> None:
    title = f"\n{cells[0].benchmark}, {cells[0].work}: time / {cells[0].baseline}"
    console.print(title, highlight=False)
    forms = list(dict.fromkeys(form for measured in cells for form in measured.seconds))
    table = Table()
    for column in ("dtype", "T", "N", "r", "k", "turns", *forms):
        table.add_column(column.replace("_", " "), justify="right")
    for measured in cells:
        ratios = [
            f"{measured.ratio(form, measured.baseline)[0]:.2f}" if form in measured.seconds else ""
            for form in forms
        ]
        names = ("dtype", "tokens", "experts", "rank", "k")
        sizes = [str(measured.sizes.get(name, "")) for name in names]
        table.add_row(*sizes, str(measured.rounds), *ratios)
    console.print(table)


def _show_goals(results: list[Measured], console: Console) -> None:
    table = Table()
    for column in ("work", "at", "goal", "measured", ""):
        table.add_column(column)
    unmeasured = 0
    for goal, measured, value, met in judged(results):
        if measured is None:
            unmeasured += 1
            continue
        work, at = f"{goal.benchmark}, {goal.work}", _text(measured.sizes)
        table.add_row(work, at, goal.text, f"{value:.2f}", "met" if met else "MISSED")
    if table.row_count:
        console.print("\ngoals", highlight=False)
        console.print(table)
    if unmeasured:
        console.print(f"{unmeasured} goals are about sizes that this run left out", highlight=False)
