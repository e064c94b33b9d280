"""`moeadapt validate <objective> --config recipe.yaml`: check a recipe without training."""

import json
from typing import Annotated

import typer

from moeadapt.cli.console import working
from moeadapt.cli.epilog import examples
from moeadapt.cli.outcome import reports_errors
from moeadapt.cli.plan import (
    CONFIG_HELP,
    FLAGS,
    FLAGS_HELP,
    OBJECTIVE_HELP,
    OPEN_ENDED,
    complete_objectives,
)


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command(
        "validate",
        context_settings=OPEN_ENDED,
        epilog=examples(
            "moeadapt validate sft --config my.yaml",
            "moeadapt validate sft --config my.yaml --moe.router top_p --json",
        ),
    )(validate)


@reports_errors
def validate(
    objective: str = typer.Argument(help=OBJECTIVE_HELP, autocompletion=complete_objectives),
    flags: Annotated[list[str] | None, typer.Argument(help=FLAGS_HELP, metavar=FLAGS)] = None,
    config: str | None = typer.Option(None, help=CONFIG_HELP),
    as_json: bool = typer.Option(False, "--json", help="Print machine-readable results."),
) -> None:
    """Check every field of a recipe, and that its targets exist in the base model.

    Reads the base model's configuration, never its weights, and writes nothing.
    """
    with working("checking"):
        from moeadapt.training.plan import plan_recipe
        from moeadapt.training.recipe import parse_recipe

        plan = plan_recipe(parse_recipe(objective, config, flags or ()))
    if as_json:
        found = {"ok": True, "targets": plan.targets, "routers": plan.routers}
        typer.echo(json.dumps({"objective": objective, "config": config, **found}))
        return
    typer.echo(f"ok: {config or objective}: {plan.targets} target linears, {plan.routers} routers")
