"""`moeadapt recipes ls` and `moeadapt recipes cp NAME DEST`: the recipes that come with it."""

import json

import typer

from moeadapt.cli.epilog import examples
from moeadapt.cli.outcome import reports_errors

recipes = typer.Typer(
    help="List and copy the recipes that come with moeadapt, to train from and to change.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    epilog=examples("moeadapt recipes ls", "moeadapt recipes cp sft/smollm2_mixlora my.yaml"),
)


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.add_typer(recipes, name="recipes")


def complete_names(incomplete: str) -> list[str]:
    """Return the names that begin like what was typed, for the shell."""
    from moeadapt.errors import MoeAdaptError
    from moeadapt.recipes import shipped_recipes

    try:
        return [name for name in shipped_recipes() if name.startswith(incomplete)]
    except MoeAdaptError:  # a shell that completes has no place for a message
        return []


def complete_folders(incomplete: str) -> list[str]:
    """Return what the recipes are for, for the shell."""
    folders = {name.partition("/")[0] for name in complete_names("")}
    return sorted(folder for folder in folders if folder.startswith(incomplete))


@recipes.command(
    "ls",
    epilog=examples("moeadapt recipes ls", "moeadapt recipes ls dpo", "moeadapt recipes ls --json"),
)
@reports_errors
def ls(
    objective: str | None = typer.Argument(
        None,
        help="sft, dpo, kto, grpo, rloo or reward; accelerate: how to launch on many GPUs. "
        "Default: all.",
        autocompletion=complete_folders,
    ),
    as_json: bool = typer.Option(False, "--json", help="Print machine-readable entries."),
) -> None:
    """List the recipes: name, and what each says of itself."""
    from moeadapt.errors import ConfigError, did_you_mean
    from moeadapt.recipes import shipped_recipes

    found = list(shipped_recipes().values())
    known = sorted({recipe.objective for recipe in found})
    if objective is not None and objective not in known:
        raise ConfigError(
            f"no recipes for {objective!r}; one of {known}{did_you_mean(objective, known)}"
        )
    found = [recipe for recipe in found if objective in (None, recipe.objective)]
    if as_json:
        entries = [
            {"name": x.name, "objective": x.objective, "line": x.line, "path": str(x.path)}
            for x in found
        ]
        typer.echo(json.dumps(entries, indent=2))
        return
    from rich.table import Table

    from moeadapt.cli.console import result_console

    table = Table("name", "what it is")
    for recipe in found:
        table.add_row(recipe.name, recipe.line)
    result_console().print(table)


@recipes.command(
    "cp",
    epilog=examples(
        "moeadapt recipes cp sft/smollm2_mixlora my.yaml",
        "moeadapt train sft --config my.yaml",
    ),
)
@reports_errors
def cp(
    name: str = typer.Argument(
        help="As `moeadapt recipes ls` lists it.", autocompletion=complete_names
    ),
    dest: str = typer.Argument(".", help="A new file, or a folder; default: the current folder."),
    force: bool = typer.Option(False, "--force", help="Replace a file that is there."),
    as_json: bool = typer.Option(False, "--json", help="Print the file's path as JSON."),
) -> None:
    """Copy a recipe, to change it."""
    from moeadapt.recipes import copy_recipe, shipped_recipes

    path = copy_recipe(name, dest, force=force)
    if as_json:
        typer.echo(json.dumps({"name": name, "path": str(path)}))
        return
    typer.echo(f"wrote {path}")
    objective = name.removeprefix("configs/").partition("/")[0]
    if objective in {x.objective for x in shipped_recipes().values()} - {"accelerate"}:
        typer.echo(f"train with it: moeadapt train {objective} --config {path}")
