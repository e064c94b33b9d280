"""`moeadapt split ADAPTER --out DIR`: every expert as an ordinary LoRA adapter."""

import json

import typer

from moeadapt.cli.adapters import ADAPTER_HELP, BASE_HELP, DTYPE_HELP, load_adapter
from moeadapt.cli.console import working
from moeadapt.cli.epilog import examples
from moeadapt.cli.outcome import reports_errors


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command(
        "split",
        epilog=examples("moeadapt split outputs/smollm2_mixlora --out outputs/experts"),
    )(split)


@reports_errors
def split(
    adapter: str = typer.Argument(help=ADAPTER_HELP),
    out: str = typer.Option(..., help="Folder to write, new or empty."),
    base: str | None = typer.Option(None, help=BASE_HELP),
    dtype: str = typer.Option("auto", help=DTYPE_HELP),
    as_json: bool = typer.Option(False, "--json", help="Print machine-readable results."),
) -> None:
    """Write every expert as an ordinary PEFT LoRA adapter, and what is always on as one more."""
    from moeadapt.export.split import split as run
    from moeadapt.hidden_folder import check_folder

    check_folder(out)
    with working(f"splitting {adapter}"):
        model, _ = load_adapter(adapter, base, dtype)
        folders = {name: str(path) for name, path in run(model, out).items()}
    if as_json:
        typer.echo(json.dumps(folders, indent=2))
        return
    for name, path in folders.items():
        typer.echo(f"{name}: {path}")
