"""`moeadapt train <objective> --config recipe.yaml [--any.flag value]`."""

import typer

from moeadapt.cli.outcome import reports_errors
from moeadapt.cli.plan import OPEN_ENDED, print_rows


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command("train", context_settings=OPEN_ENDED)(train)


@reports_errors
def train(
    context: typer.Context,
    objective: str = typer.Argument(help="sft, dpo, kto, grpo, rloo or reward."),
    config: str | None = typer.Option(None, help="A recipe; see configs/<objective>/*.yaml."),
    dry_run: bool = typer.Option(
        False, "--dry-run", help="Check the recipe and print the plan; no writes, no network."
    ),
) -> None:
    """Train an adapter with one of TRL's trainers.

    Any field of the recipe can follow as a flag and wins over the file, nested ones with a dot:

    moeadapt train sft --config configs/sft/smollm2_mixlora.yaml --moe.num_experts 4 --max_steps 50
    """
    from moeadapt.training.recipe import parse_recipe

    recipe = parse_recipe(objective, config, context.args)
    if dry_run:
        from moeadapt.training.plan import plan_recipe

        rows = [*plan_recipe(recipe, offline=True).rows(), *recipe.rows()]
        print_rows(f"dry run: {config or objective}", rows)
        return
    from moeadapt.training.run import run

    run(recipe)
