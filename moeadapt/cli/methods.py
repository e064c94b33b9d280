"""`moeadapt methods`: what every registry holds, with its source."""

import json

import typer

from moeadapt.cli.console import result_console, working
from moeadapt.cli.epilog import examples
from moeadapt.cli.outcome import reports_errors

KINDS = ("balance", "experts", "preset", "router")
"""As in `moeadapt.catalogue.KINDS`, which takes torch to import."""


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command(
        "methods",
        epilog=examples(
            "moeadapt methods", "moeadapt methods router", "moeadapt methods preset --json"
        ),
    )(methods)


def complete_kinds(incomplete: str) -> list[str]:
    """Return the kinds that begin like what was typed, for the shell."""
    return [kind for kind in KINDS if kind.startswith(incomplete)]


@reports_errors
def methods(
    kind: str | None = typer.Argument(
        None,
        help="router, balance, experts or preset; default: all.",
        autocompletion=complete_kinds,
    ),
    as_json: bool = typer.Option(False, "--json", help="Print machine-readable entries."),
    as_markdown: bool = typer.Option(
        False, "--markdown", help="Print every kind as the page docs/methods.md."
    ),
    as_combinations: bool = typer.Option(
        False, "--combinations", help="Print what goes together, the page docs/combinations.md."
    ),
) -> None:
    """List routers, balance losses, expert types and presets, and where they were published."""
    with working("reading the registries"):
        from moeadapt import catalogue
    from moeadapt.errors import ConfigError, did_you_mean

    if kind is not None and kind not in catalogue.KINDS:
        raise ConfigError(
            f"unknown kind {kind!r}; one of {sorted(catalogue.KINDS)}"
            f"{did_you_mean(kind, catalogue.KINDS)}"
        )
    if as_json + as_markdown + as_combinations > 1:
        raise ConfigError("--json, --markdown and --combinations exclude each other")
    if as_combinations:
        from moeadapt.tuner import combinations

        typer.echo(combinations.markdown(), nl=False)
        return
    if as_markdown and kind is not None:
        raise ConfigError(f"--markdown prints every kind; leave out {kind!r}")
    if as_markdown:
        typer.echo(catalogue.markdown(), nl=False)
        return
    found = [method for method in catalogue.methods() if kind in (None, method.kind)]
    if as_json:
        typer.echo(json.dumps([method.to_dict() for method in found], indent=2))
        return
    from rich.table import Column, Table

    console = result_console()
    for name, (title, _) in catalogue.KINDS.items():
        if kind in (None, name):
            source = Column("source", overflow="fold")
            table = Table("name", "what it is", source, title=title, title_justify="left")
            for method in found:
                if method.kind == name:
                    table.add_row(method.name, method.line, method.url or method.source)
            console.print(table)
