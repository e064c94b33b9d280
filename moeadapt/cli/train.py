"""`moeadapt train <objective> --config recipe.yaml [--any.flag value]`."""

import typer

from moeadapt.cli.outcome import reports_errors

OPEN_ENDED = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Every field of the recipe is a flag; the recipe's own parser refuses what it does not know."""


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command("train", context_settings=OPEN_ENDED)(train)


@reports_errors
def train(
    context: typer.Context,
    objective: str = typer.Argument(help="sft, dpo, kto, grpo, rloo or reward."),
    config: str | None = typer.Option(None, help="A recipe; see configs/<objective>/*.yaml."),
) -> None:
    """Train an adapter with one of TRL's trainers.

    Any field of the recipe can follow as a flag and wins over the file, nested ones with a dot:

    moeadapt train sft --config configs/sft/smollm2_mixlora.yaml --moe.num_experts 4 --max_steps 50
    """
    from moeadapt.training.recipe import parse_recipe
    from moeadapt.training.run import run

    run(parse_recipe(objective, config, context.args))
