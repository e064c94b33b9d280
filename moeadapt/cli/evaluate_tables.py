"""Tables of what `moeadapt eval` found."""

from typing import Any

from rich.console import Console
from rich.table import Table

from moeadapt.cli.console import result_console


def print_tables(found: dict[str, Any]) -> None:
    """Print the results, as `moeadapt eval --json` has them."""
    console = result_console()
    other = found.get("other", {})
    if "data" in found:
        _print_losses(console, "adapter", found["data"])
        if "data" in other:
            _print_losses(console, str(found["against"]), other["data"])
    if "comparison" in found:
        _print_comparison(console, found["comparison"], str(found["against"]))
    for name, arm in (("adapter", found), (str(found["against"]), other)):
        if "forgetting" in arm:
            _print_forgetting(console, name, arm["forgetting"])
    if "tasks" in found:
        _print_tasks(console, found["tasks"], other.get("tasks"), str(found["against"]))


def _print_losses(console: Console, arm: str, evaluation: dict[str, Any]) -> None:
    generated = evaluation["overall"]["answered"] > 0
    columns = ["domain", "rows", "tokens", "loss", "95 %", *(["exact", "95 %"] * generated)]
    table = Table(*columns, title=f"Held-out loss, nats per token: {arm}")
    for name, score in [("all rows", evaluation["overall"]), *evaluation["by_domain"].items()]:
        cells = [name, str(score["rows"]), str(score["tokens"]), f"{score['nll']:.4f}"]
        cells.append(_interval(score["nll_interval"], ".4f"))
        if generated:
            exact = score["exact"]
            cells.append("-" if exact is None else f"{exact:.1%}")
            cells.append(_interval(score["exact_interval"], ".1%"))
        table.add_row(*cells)
    console.print(table)
    if evaluation["truncated"]:
        console.print(
            f"{evaluation['truncated']} rows were cut at {evaluation['max_length']} tokens"
        )


def _print_comparison(console: Console, comparison: dict[str, Any], against: str) -> None:
    table = Table("domain", "measure", "difference", "95 %", "p")
    table.title = f"adapter minus {against}, row by row"
    for measure, unit in (("nll", "+.4f"), ("exact", "+.1%")):
        whole = comparison[measure]
        if whole is None:
            continue
        name = "loss" if measure == "nll" else "exact"
        for domain, one in [("all rows", whole), *comparison[f"{measure}_by_domain"].items()]:
            value, interval = format(one["value"], unit), _interval(one["interval"], unit)
            table.add_row(domain, name, value, interval, f"{one['p']:.4f}")
    console.print(table)


def _print_forgetting(console: Console, arm: str, forgetting: dict[str, Any]) -> None:
    table = Table("domain", "off", "on", "rise", "95 %", "p")
    table.title = f"Loss on the base's own text, nats per token: {arm}"
    off, on, change = forgetting["off"], forgetting["on"], forgetting["change"]
    lines = [("all rows", off["overall"], on["overall"], change["nll"])]
    lines += [
        (name, off["by_domain"][name], on["by_domain"][name], one)
        for name, one in change["nll_by_domain"].items()
    ]
    for name, before, after, one in lines:
        interval = _interval(one["interval"], "+.4f")
        losses = [f"{before['nll']:.4f}", f"{after['nll']:.4f}", f"{one['value']:+.4f}"]
        table.add_row(name, *losses, interval, f"{one['p']:.4f}")
    console.print(table)


def _print_tasks(
    console: Console, tasks: dict[str, Any], other: dict[str, Any] | None, against: str
) -> None:
    table = Table("task", "metric", "rows", "adapter", *([against] if other else []))
    table.title = "Tasks of lm-eval, with standard errors"
    for name, task in tasks["tasks"].items():
        for metric in task["values"]:
            cells = [_value(task, metric)]
            if other:
                cells.append(_value(other["tasks"][name], metric))
            table.add_row(name, metric, str(task["rows"]), *cells)
    console.print(table)


def _value(task: dict[str, Any], metric: str) -> str:
    error = task["errors"].get(metric)
    return f"{task['values'][metric]:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _interval(interval: dict[str, float] | None, unit: str) -> str:
    if interval is None:
        return "-"
    return f"{format(interval['low'], unit)} to {format(interval['high'], unit)}"
