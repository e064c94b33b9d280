"""Tables of a card: held-out losses of `moeadapt eval --out`, and the arms of a report."""

import json
from pathlib import Path
from typing import Any

from moeadapt.errors import ConfigError
from moeadapt.model_card.markdown import table

MAX_BYTES = 64 << 20


def read_results(path: str | Path) -> dict[str, Any]:
    """Read what `moeadapt eval --out` wrote.

    Raises:
        ConfigError: it is no such file.
    """
    try:
        if Path(path).stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_BYTES} bytes; give the results of eval")
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        evaluation_tables(found)
    except OSError as error:
        raise ConfigError(f"cannot read the evaluation {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{path}: is not what `moeadapt eval --out` wrote ({type(error).__name__}: {error}); "
            "give that file"
        ) from None
    return found


def evaluation_tables(found: dict[str, Any]) -> list[str]:
    """Return tables of losses and tasks, Markdown.

    Raises:
        KeyError, TypeError, ValueError: `found` is no result of an evaluation.
    """
    tables, other = [], found.get("other") or {}
    if "data" in found:
        tables.append(_losses(found["data"], other.get("data")))
    if "tasks" in found:
        rows = [
            (task, metric, result["rows"], f"{value:.4f}")
            for task, result in found["tasks"]["tasks"].items()
            for metric, value in result["values"].items()
        ]
        tables.append(table(("task", "metric", "rows", "value"), rows))
    if "forgetting" in found:
        off, on = found["forgetting"]["off"]["overall"], found["forgetting"]["on"]["overall"]
        row = (off["rows"], f"{off['nll']:.4f}", f"{on['nll']:.4f}")
        columns = ("rows of the base's own text", "loss without the adapter", "with it")
        tables.append(table(columns, [row]))
    if not tables:
        raise ValueError("it holds no data, no tasks and no forgetting")
    return tables


def _losses(own: dict[str, Any], other: dict[str, Any] | None) -> str:
    columns = ["held-out rows", "rows", "loss, nats per token", "95 %"]
    against = {} if other is None else {"all": other["overall"], **other["by_domain"]}
    if against:
        columns.append("compared with")
    rows = []
    for name, score in [("all", own["overall"]), *own["by_domain"].items()]:
        line = [name, score["rows"], f"{score['nll']:.4f}", _interval(score["nll_interval"])]
        if against:
            line.append(f"{against[name]['nll']:.4f}" if name in against else "-")
        rows.append(line)
    return table(columns, rows)


def _interval(found: dict[str, float] | None) -> str:
    return "-" if found is None else f"{found['low']:.4f} to {found['high']:.4f}"


def arms_table(numbers: dict[str, Any]) -> str:
    """Return the arms of a report, Markdown.

    Args:
        numbers: the JSON file of a report.

    Raises:
        ConfigError: it is none.
    """
    try:
        rows = [
            (arm["name"], f"{arm['nll']:.4f}", f"{arm['nll_low']:.4f} to {arm['nll_high']:.4f}")
            for arm in numbers["arms"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"the report's .json is not what moeadapt writes: {error!r}") from None
    return table(("routing", "loss, nats per token", "95 %"), rows)
