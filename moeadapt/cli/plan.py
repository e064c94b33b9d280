"""`moeadapt plan <objective> --config recipe.yaml`: what a run will cost."""

import json

import typer

from moeadapt.cli.outcome import reports_errors
from moeadapt.cli.train import OPEN_ENDED


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
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"plan: {config or objective}", show_header=False)
    for label, value in numbers.rows():
        table.add_row(label, value)
    Console().print(table)
