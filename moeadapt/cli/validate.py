"""`moeadapt validate <objective> --config recipe.yaml`: check a recipe without training."""

import typer

from moeadapt.cli.outcome import reports_errors
from moeadapt.cli.plan import OPEN_ENDED


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command("validate", context_settings=OPEN_ENDED)(validate)


@reports_errors
def validate(
    context: typer.Context,
    objective: str = typer.Argument(help="sft, dpo, kto, grpo, rloo or reward."),
    config: str | None = typer.Option(None, help="A recipe; see configs/<objective>/*.yaml."),
) -> None:
    """Check every field of a recipe, and that its targets exist in the base model.

    Reads the base model's configuration, never its weights, and writes nothing.
    """
    from moeadapt.training.plan import plan_recipe
    from moeadapt.training.recipe import parse_recipe

    plan = plan_recipe(parse_recipe(objective, config, context.args))
    typer.echo(f"ok: {config or objective}: {plan.targets} target linears, {plan.routers} routers")
