"""The command line: `moeadapt <verb>`. One file per verb; heavy imports wait until a verb runs."""

import io
import sys
import warnings

import typer

from moeadapt.cli import (
    chat,
    demo,
    doctor,
    evaluate,
    export,
    merge,
    methods,
    plan,
    push,
    recipes,
    report,
    split,
    train,
    upcycle,
    validate,
)
from moeadapt.cli.epilog import examples
from moeadapt.version import __version__

START = examples(
    "moeadapt recipes cp sft/smollm2_mixlora my.yaml",
    "moeadapt train sft --config my.yaml --output_dir outputs/first",
    "moeadapt chat outputs/first",
)

EXIT_CODES = (
    "[bold]Exit codes[/bold]\n\n0 done; 1 failed while working; 2 the input is wrong, nothing was "
    "done; 130 interrupted (Ctrl-C); 143 terminated, `train` after a complete checkpoint."
)

app = typer.Typer(
    name="moeadapt",
    help="Mixtures of LoRA experts with adaptive routers, as a PEFT method.",
    epilog=f"{START}\n\n{EXIT_CODES}",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

_VERBS = (
    *(demo, recipes, train, validate, plan, methods, evaluate, report, chat),
    *(merge, split, upcycle, export, push, doctor),
)
for verb in _VERBS:
    verb.add_to(app)


def _print_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit
    return wanted


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Mixtures of LoRA experts with adaptive routers, as a PEFT method."""


def main() -> None:
    """Run the command line.

    Exit codes: 0 done; 1 failed while working; 2 the input is wrong, nothing was done; 130
    interrupted (Ctrl-C); 143 terminated, `train` after a complete checkpoint. `doctor` also ends
    with 2 when it finds errors.
    """
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets a question mark, not a traceback.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if not sys.warnoptions:
        # What libraries tell each other about their next versions is not for a user to act on.
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
    app(prog_name="moeadapt")
