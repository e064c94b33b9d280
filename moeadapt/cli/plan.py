"""`moeadapt plan <objective> --config recipe.yaml`: what a run will cost."""

import json
from collections.abc import Iterable

import typer

from moeadapt.cli.outcome import reports_errors

OPEN_ENDED = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Every field of the recipe is a flag; the recipe's own parser refuses what it does not know."""


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command("plan", context_settings=OPEN_ENDED)(plan)


@reports_errors
def plan(
    context: typer.Context,
    objective: str = typer.Argument(help="sft, dpo, kto, grpo, rloo or reward."),
    config: str | None = typer.Option(None, help="A recipe; see configs/<objective>/*.yaml."),
    as_json: bool = typer.Option(False, "--json", help="Print machine-readable numbers."),
) -> None:
    """Count parameters, adapter bytes and estimated memory of a recipe, without a GPU."""
    from moeadapt.training.plan import plan_recipe
    from moeadapt.training.recipe import parse_recipe

    numbers = plan_recipe(parse_recipe(objective, config, context.args))
    if as_json:
        typer.echo(json.dumps(numbers.to_dict(), indent=2))
        return
    print_rows(f"plan: {config or objective}", numbers.rows())


def print_rows(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print labels and values as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, show_header=False)
    for label, value in rows:
        table.add_row(label, value)
    Console().print(table)
