"""`moeadapt push FOLDER owner/name`: publish an adapter or a checkpoint in one commit."""

import json
import sys
from contextlib import redirect_stdout
from typing import Annotated, Any

import typer

from moeadapt.cli.console import result_console, working
from moeadapt.cli.epilog import examples
from moeadapt.cli.outcome import reports_errors
from moeadapt.errors import ConfigError


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command(
        "push",
        epilog=examples(
            "moeadapt push outputs/math ann/math --license apache-2.0 --dry-run",
            "moeadapt push outputs/math ann/math --license apache-2.0 --report report.html",
            "# a stock checkpoint that export or upcycle wrote",
            "moeadapt push my-moe ann/math-moe --license apache-2.0 --private",
        ),
    )(push)


@reports_errors
def push(
    folder: str = typer.Argument(
        help="Folder of a saved adapter, or of an exported or upcycled checkpoint."
    ),
    repo_id: str = typer.Argument(help="owner/name on the hub; made if it is not there."),
    license: str | None = typer.Option(
        None, help="Such as apache-2.0; default: that of the README.md."
    ),
    base_model: str | None = typer.Option(
        None, help="Id of the base on the hub, if the adapter names a folder."
    ),
    dataset: Annotated[
        list[str] | None, typer.Option(help="Id of a data set it was trained on; repeat it.")
    ] = None,
    recipe: str | None = typer.Option(None, help="YAML file of the run; default: recipe.yaml."),
    report: str | None = typer.Option(
        None, help="Page that `moeadapt report` wrote; default: report.html."
    ),
    evaluation: str | None = typer.Option(None, help="File that `moeadapt eval --out` wrote."),
    with_static_lora: bool = typer.Option(
        False, "--with-static-lora", help="Add an ordinary LoRA made of the mixture."
    ),
    data: str | None = typer.Option(
        None, help="For --with-static-lora: a .jsonl file of what it will be used for."
    ),
    private: bool | None = typer.Option(
        None, "--private/--public", help="Of a new repository; default: what the account says."
    ),
    revision: str | None = typer.Option(None, help="Branch; default: main."),
    create_pr: bool = typer.Option(False, "--create-pr", help="Open a pull request instead."),
    message: str | None = typer.Option(None, help="Of the commit."),
    token: str | None = typer.Option(
        None, help="Default, and better: HF_TOKEN, or `hf auth login`.", show_default=False
    ),
    overwrite: bool = typer.Option(
        False, "--overwrite", help="Write over files that moeadapt did not write."
    ),
    dry_run: bool = typer.Option(
        False, "--dry-run", help="Check, print the card, send nothing, use no network."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print machine-readable results."),
) -> None:
    """Publish an adapter, or a checkpoint made of one, with its model card, in one commit.

    Everything is checked before the first byte is sent: the files, the base, the licence, and that
    no file holds a token or a path of this machine. The text that you wrote into README.md stays.
    """
    if data is not None and not with_static_lora:
        raise ConfigError("--data belongs to --with-static-lora, which is not given; leave it out")
    # What other libraries print is progress, and stdout is for the result.
    with redirect_stdout(sys.stderr), working(f"publishing {folder}"):
        from moeadapt.hub.push import push as run
        from moeadapt.rows import read_rows

        rows = None if data is None else read_rows(data)
        result = run(
            folder,
            repo_id,
            license=license,
            base_model=base_model,
            datasets=dataset or (),
            recipe=recipe,
            report=report,
            evaluation=evaluation,
            with_static_lora=with_static_lora,
            data=rows,
            private=private,
            revision=revision,
            create_pr=create_pr,
            message=message,
            token=token,
            overwrite=overwrite,
            dry_run=dry_run,
        )
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2))
    else:
        _print(result)


def _print(result: Any) -> None:
    from rich.table import Table

    console = result_console()
    if result.commit is None:
        console.print(result.card, soft_wrap=True)
    table = Table("file", "bytes", title=f"{result.kind} for {result.repo_id}")
    for name, size in result.files.items():
        table.add_row(name, f"{size:,}")
    console.print(table)
    for name in result.deleted:
        console.print(f"removed there, part of an earlier push: {name}", soft_wrap=True)
    for name, why in result.left_out.items():
        console.print(f"stays here: {name} ({why})", soft_wrap=True)
    if result.commit is None:
        console.print("dry run: nothing was sent")
    else:
        console.print(f"pushed: {result.pull_request or result.url}", soft_wrap=True)
