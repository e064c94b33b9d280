"""`moeadapt train <objective> --config recipe.yaml [--any.flag value]`."""

import json
import sys
from contextlib import nullcontext, redirect_stdout
from typing import Annotated, Any

import typer

from moeadapt.cli.console import libraries_quiet, working
from moeadapt.cli.epilog import examples
from moeadapt.cli.outcome import reports_errors
from moeadapt.cli.plan import (
    CONFIG_HELP,
    FLAGS,
    FLAGS_HELP,
    OBJECTIVE_HELP,
    OPEN_ENDED,
    complete_objectives,
    print_rows,
)
from moeadapt.progress import watched


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command(
        "train",
        context_settings=OPEN_ENDED,
        epilog=examples(
            "moeadapt recipes cp sft/smollm2_mixlora my.yaml",
            "moeadapt train sft --config my.yaml --dry-run",
            "moeadapt train sft --config my.yaml --moe.num_experts 4 --max_steps 50",
            "# go on after a stop",
            "moeadapt train sft --config my.yaml --resume_from_checkpoint last",
        ),
    )(train)


@reports_errors
def train(
    objective: str = typer.Argument(help=OBJECTIVE_HELP, autocompletion=complete_objectives),
    flags: Annotated[list[str] | None, typer.Argument(help=FLAGS_HELP, metavar=FLAGS)] = None,
    config: str | None = typer.Option(None, help=CONFIG_HELP),
    dry_run: bool = typer.Option(
        False, "--dry-run", help="Check the recipe and print the plan; no writes, no network."
    ),
    as_json: bool = typer.Option(
        False, "--json", help="Print only the result, machine-readable; the log goes to stderr."
    ),
) -> None:
    """Train an adapter with one of TRL's trainers and save it to the recipe's output_dir.

    Ctrl-C and SIGTERM write a complete checkpoint before the run ends.
    """
    with working("checking the recipe"):
        from moeadapt.training.recipe import parse_recipe

        recipe = parse_recipe(objective, config, flags or ())
    if dry_run:
        _plan(recipe, config or objective, as_json)
        return
    from moeadapt.training.run import run

    if not watched():
        # Bars in a log file are thousands of lines; the losses are logged without them, too.
        import datasets

        recipe.trainer_args.disable_tqdm = True
        datasets.disable_progress_bars()
    with libraries_quiet(), redirect_stdout(sys.stderr) if as_json else nullcontext():
        done = run(recipe)
    if not recipe.trainer_args.should_save:  # another process of the same run says it
        return
    if as_json:
        typer.echo(json.dumps(done))
        return
    typer.echo(f"wrote {done['adapter']}: {done['steps']} steps, loss {done['train_loss']:.4f}")
    if recipe.objective.task_type == "CAUSAL_LM":
        typer.echo(f"talk to it: moeadapt chat {done['adapter']}")


def _plan(recipe: Any, title: str, as_json: bool) -> None:
    from moeadapt.training.plan import plan_recipe

    with working("counting"):
        plan = plan_recipe(recipe, offline=True)
    if as_json:
        typer.echo(json.dumps({**plan.to_dict(), **dict(recipe.rows())}))
        return
    print_rows(f"dry run: {title}", [*plan.rows(), *recipe.rows()])
