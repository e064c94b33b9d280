"""`moeadapt merge ADAPTER --method ... --out DIR`: one ordinary LoRA in place of a mixture."""

import json
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import typer

from moeadapt.cli.adapters import (
    ADAPTER_HELP,
    BASE_HELP,
    DTYPE_HELP,
    load_adapter,
    read_rows,
    to_batches,
)
from moeadapt.cli.console import result_console, working
from moeadapt.cli.epilog import examples
from moeadapt.cli.outcome import reports_errors
from moeadapt.errors import ConfigError
from moeadapt.progress import watched

HELD_OUT = 5
"""Every so many rows of the data, one is held out for the losses."""

DEFAULT_MAX_LENGTH = 1024


@dataclass(frozen=True, kw_only=True)
class _Training:
    """How `distill` trains: optimizer steps, learning rate, tokens of a row."""

    steps: int
    learning_rate: float
    max_length: int


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command(
        "merge",
        epilog=examples(
            "moeadapt merge outputs/smollm2_mixlora --out outputs/merged --data train.jsonl",
            "moeadapt merge outputs/smollm2_mixlora --out outputs/expert3 --method single "
            "--expert 3",
        ),
    )(merge)


@reports_errors
def merge(
    adapter: str = typer.Argument(help=ADAPTER_HELP),
    out: str = typer.Option(..., help="Folder to write, new or empty."),
    method: str = typer.Option(
        "least_squares",
        help="How the experts become one. On --data: least_squares (nearest to the mixture), usage "
        "(by their mean weight), distill (trained to answer like it). Without: uniform, single "
        "(one expert), sum, mean, top_k, svd.",
    ),
    data: str | None = typer.Option(
        None,
        help="A .jsonl file; each row has text, or prompt and completion, or messages, and may "
        "have a domain.",
    ),
    held_out: str | None = typer.Option(
        None, help="Another such file for the losses; default: every fifth row of --data."
    ),
    expert: int | None = typer.Option(None, help="For single: which expert."),
    rank: int | None = typer.Option(None, help="Largest rank; default: all experts together."),
    base: str | None = typer.Option(None, help=BASE_HELP),
    dtype: str = typer.Option("auto", help=DTYPE_HELP),
    max_length: int | None = typer.Option(
        None, min=2, help="Tokens of a row, the rest is cut; default: 1024."
    ),
    steps: int | None = typer.Option(
        None, min=1, help="For distill: optimizer steps; default: 200."
    ),
    learning_rate: float | None = typer.Option(None, help="For distill; default: 2e-4."),
    as_json: bool = typer.Option(False, "--json", help="Print machine-readable results."),
) -> None:
    """Make one ordinary PEFT LoRA adapter of a mixture, and say what it keeps.

    No LoRA equals a mixture whose routing depends on the input. With --data the residual of each
    method and the held-out losses with the mixture, with the LoRA and without either are printed.
    """
    from moeadapt.hidden_folder import check_folder

    _check(
        method,
        data,
        **{
            "--expert": expert,
            "--steps": steps,
            "--learning-rate": learning_rate,
            "--held-out": held_out,
            "--max-length": max_length,
        },
    )
    check_folder(out)
    max_length = max_length or DEFAULT_MAX_LENGTH
    rows = None if data is None else read_rows(data)
    others = None if held_out is None else read_rows(held_out)
    with working(f"loading {adapter}"):
        model, tokenizer = load_adapter(adapter, base, dtype)
    if rows is not None and others is None and len(rows) >= HELD_OUT:
        others = rows[HELD_OUT - 1 :: HELD_OUT]
        rows = [row for i, row in enumerate(rows) if i % HELD_OUT != HELD_OUT - 1]
    batches = None if rows is None else to_batches(rows, tokenizer, max_length=max_length)
    held = None if others is None else to_batches(others, tokenizer, max_length=max_length)
    if method == "distill":
        training = _Training(
            steps=200 if steps is None else steps,
            learning_rate=2e-4 if learning_rate is None else learning_rate,
            max_length=max_length,
        )
        # What the trainer prints is progress, and stdout is for the result.
        with redirect_stdout(sys.stderr):
            result = _distill(
                model, tokenizer, rows or [], training, out=out, rank=rank, held_out=held
            )
    else:
        from moeadapt.export.merge import merge as run

        with working(f"merging by {method}"):
            result = run(model, out, method, expert=expert, rank=rank, data=batches, held_out=held)
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2))
    else:
        _print(result.to_dict())


def _check(method: str, data: str | None, **given: Any) -> None:
    """Refuse an unknown method, missing data, and options that the method would not look at."""
    from moeadapt.export.merge_methods import MERGES

    distills = method == "distill"
    if data is None and (distills or MERGES[method].needs_data):
        raise ConfigError(
            f"--method {method} needs --data, rows on which the mixture is looked at; without any "
            "take --method uniform"
        )
    if not distills:
        MERGES[method]
    owners = {"--expert": "single", "--steps": "distill", "--learning-rate": "distill"}
    for option, owner in owners.items():
        if given[option] is not None and method != owner:
            raise ConfigError(f"{option} belongs to --method {owner}, not {method}; leave it out")
    if given["--max-length"] is not None and data is None and given["--held-out"] is None:
        raise ConfigError("--max-length cuts rows, and there are none; give --data, or leave it")


def _distill(
    model: Any,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    training: _Training,
    *,
    out: str,
    rank: int | None,
    held_out: Any,
) -> Any:
    import tempfile

    import torch
    import trl
    from datasets import Dataset

    from moeadapt.training.distill import distill

    plain = [{k: v for k, v in row.items() if k != "domain"} for row in rows]
    columns = sorted({tuple(sorted(row)) for row in plain})
    if len(columns) > 1:
        raise ConfigError(
            f"--method distill trains on rows of one form, and --data has {columns[:3]}; give all "
            "rows the same columns (domain is free)"
        )
    with tempfile.TemporaryDirectory() as scratch:
        args = trl.SFTConfig(
            output_dir=scratch,
            max_steps=training.steps,
            learning_rate=training.learning_rate,
            max_length=training.max_length,
            logging_steps=max(training.steps // 10, 1),
            save_strategy="no",
            report_to="none",
            disable_tqdm=not watched(),
            bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        )
        return distill(
            model,
            Dataset.from_list(plain),
            args=args,
            out_dir=out,
            rank=rank,
            tokenizer=tokenizer,
            held_out=held_out,
        )


def _print(found: dict[str, Any]) -> None:
    from rich.table import Table

    console = result_console()
    menu = dict(found.get("menu", {}))
    if found.get("residuals") is not None:
        menu[found["method"]["name"]] = found["mean_residual"]
        console.print("Mean residual: 0 is the mixture exactly, 1 is no adapter at all")
        table = Table("method", "residual")
        for name, value in sorted(menu.items(), key=lambda item: item[1]):
            table.add_row(name, f"{value:.3f}")
        console.print(table)
        table = Table("linear", "rank", "residual", title=f"Each linear, {found['method']['name']}")
        for key, rank in found["ranks"].items():
            value = found["residuals"].get(key)
            table.add_row(key, str(rank), "exact" if value is None else f"{value:.3f}")
        console.print(table)
    else:
        console.print("residual: not measured; give --data to see how far this is from the mixture")
    if found["losses"]:
        held = "held-out rows" if found["held_out"] else "the data itself"
        names = list(found["losses"])
        table = Table("domain", *names, title=f"Loss per token on {held}")
        table.add_row("all", *(f"{found['losses'][name]['mean']:.4f}" for name in names))
        for domain in found["losses"][names[0]]["by_domain"]:
            values = [found["losses"][name]["by_domain"][domain] for name in names]
            table.add_row(domain, *(f"{value:.4f}" for value in values))
        console.print(table)
    if "divergence" in found:
        held = "held-out rows" if found["held_out"] else "training rows"
        console.print(
            f"divergence from the mixture: {found['divergence']:.4f} nats per token, {held}"
        )
    console.print(f"wrote {found['out_dir']}")
