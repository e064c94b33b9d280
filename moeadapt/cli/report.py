"""`moeadapt report ADAPTER --data rows.jsonl`: what a mixture does with its experts."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from moeadapt.cli.adapters import (
    ADAPTER_HELP,
    BASE_HELP,
    DEVICE_HELP,
    DTYPE_HELP,
    load_adapter,
    read_rows,
    to_device,
)
from moeadapt.cli.console import working
from moeadapt.cli.epilog import examples
from moeadapt.cli.outcome import reports_errors
from moeadapt.errors import ConfigError

DATA_HELP = (
    "A .jsonl file of rows that were not trained on; each has text, or prompt and completion, or "
    "messages, and may have a domain."
)


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command(
        "report",
        epilog=examples(
            "moeadapt report outputs/smollm2_mixlora --data held-out.jsonl",
            "moeadapt report outputs/smollm2_mixlora --data held-out.jsonl --log "
            "outputs/smollm2_mixlora --out reports/first.html --json",
        ),
    )(report)


@reports_errors
def report(
    adapter: str = typer.Argument(help=ADAPTER_HELP),
    data: str = typer.Option(..., help=DATA_HELP),
    out: str = typer.Option("report.html", help="Page to write; its numbers go beside it."),
    base: str | None = typer.Option(None, help=BASE_HELP),
    dtype: str = typer.Option("auto", help=DTYPE_HELP),
    device: str = typer.Option("auto", help=DEVICE_HELP),
    log: str | None = typer.Option(
        None, help="The training log: trainer_state.json, or the run's folder."
    ),
    max_length: int = typer.Option(256, help="Tokens of a text; the rest is cut."),
    max_texts: int | None = typer.Option(None, help="Texts per domain; default: all."),
    batch_size: int = typer.Option(8, help="Texts at a time."),
    as_json: bool = typer.Option(False, "--json", help="Print machine-readable results."),
) -> None:
    """Write a report: balance, specialisation, use, and whether routing is worth it."""
    if max_texts is not None and max_texts < 1:
        raise ConfigError(f"--max-texts {max_texts} must be at least 1")
    rows = read_rows(data)
    # Before the model is loaded, which takes longer than any of these checks.
    from moeadapt.report.report import check_out
    from moeadapt.report.report import report as run
    from moeadapt.report.training_log import find_training_log

    check_out(out)
    if log is not None:
        find_training_log(log)
    with working(f"reporting on {adapter}"):
        model, tokenizer = load_adapter(adapter, base, dtype)
        found = run(
            to_device(model, device),
            tokenizer,
            texts_by_domain(rows, tokenizer, max_texts),
            out,
            max_length=max_length,
            batch_size=batch_size,
            training_log=log,
            title=Path(adapter).resolve().name,
        )
    files = [str(path) for path in found.files]
    if as_json:
        numbers = found.data.to_json()
        shown = {name: numbers[name] for name in ("verdicts", "arms", "tokens", "seconds")}
        typer.echo(json.dumps({**shown, "files": files}, indent=2))
        return
    for tile in found.data.verdicts:
        typer.echo(f"{tile.name}: {tile.answer}. {tile.reason}")
    for path in files:
        typer.echo(f"wrote {path}")


def texts_by_domain(
    rows: Sequence[dict[str, Any]], tokenizer: Any, max_texts: int | None = None
) -> dict[str, list[str]]:
    """Turn rows into texts: messages by the chat template, a completion after its prompt.

    Args:
        rows: what `read_rows` returned; without any domain they are all of the domain `all`, else
            those without one are of `other`.
        tokenizer: of the base model.
        max_texts: of each domain, the first ones; None: all.

    Raises:
        ConfigError: there are messages, and the tokenizer has no chat template.
    """
    if any("messages" in row for row in rows) and not tokenizer.chat_template:
        raise ConfigError(
            "rows have messages, and the tokenizer of the base has no chat template; give text, or "
            "prompt and completion"
        )
    unnamed = "other" if any("domain" in row for row in rows) else "all"
    found: dict[str, list[str]] = {}
    for row in rows:
        own = found.setdefault(row.get("domain", unnamed), [])
        if max_texts is None or len(own) < max_texts:
            own.append(_text(row, tokenizer))
    return found


def _text(row: dict[str, Any], tokenizer: Any) -> str:
    if "messages" in row:
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        bos = tokenizer.bos_token
        # The tokenizer puts it before every text, also before one whose template has it.
        doubled = bos is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        return text.removeprefix(bos) if doubled else text
    return row["text"] if "text" in row else row["prompt"] + row["completion"]
