"""`moeadapt plan <objective> --config recipe.yaml`: what a run will cost."""

import json
from collections.abc import Iterable
from typing import Annotated

import typer

from moeadapt.cli.console import result_console, working
from moeadapt.cli.epilog import examples
from moeadapt.cli.outcome import reports_errors

OBJECTIVE_HELP = "What to train for: sft, dpo, kto, grpo, rloo or reward."

CONFIG_HELP = "A recipe, a YAML file; `moeadapt recipes ls` lists those that come with moeadapt."

FLAGS = "--FIELD VALUE"

FLAGS_HELP = (
    "Any field of the recipe; it wins over the file. Nested ones take a dot: --moe.router.k 1."
)

OPEN_ENDED = {"ignore_unknown_options": True}
"""Every field of the recipe is a flag; the recipe's own parser refuses what it does not know."""


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command(
        "plan",
        context_settings=OPEN_ENDED,
        epilog=examples(
            "moeadapt plan sft --config my.yaml",
            "moeadapt plan sft --config my.yaml --moe.num_experts 16 --json",
        ),
    )(plan)


def complete_objectives(incomplete: str) -> list[str]:
    """Return the objectives that begin like what was typed, for the shell."""
    from moeadapt.training.objectives import OBJECTIVES

    return [name for name in OBJECTIVES if name.startswith(incomplete)]


@reports_errors
def plan(
    objective: str = typer.Argument(help=OBJECTIVE_HELP, autocompletion=complete_objectives),
    flags: Annotated[list[str] | None, typer.Argument(help=FLAGS_HELP, metavar=FLAGS)] = None,
    config: str | None = typer.Option(None, help=CONFIG_HELP),
    as_json: bool = typer.Option(False, "--json", help="Print machine-readable numbers."),
) -> None:
    """Say what a run will cost: parameters, adapter bytes, estimated memory; needs no GPU."""
    with working("counting"):
        from moeadapt.training.plan import plan_recipe
        from moeadapt.training.recipe import parse_recipe

        numbers = plan_recipe(parse_recipe(objective, config, flags or ()))
    if as_json:
        typer.echo(json.dumps(numbers.to_dict(), indent=2))
        return
    print_rows(f"plan: {config or objective}", numbers.rows())


def print_rows(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print labels and values as a table."""
    from rich.table import Table

    table = Table(title=title, show_header=False)
    for label, value in rows:
        table.add_row(label, value)
    result_console().print(table)
