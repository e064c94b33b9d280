"""Turns what a verb raises into a message and an exit code."""

import functools
from collections.abc import Callable
from typing import ParamSpec

import typer

from moeadapt.errors import ConfigError, MoeAdaptError, TrainingStopped, UnsupportedError
from moeadapt.extras import needs_extra
from moeadapt.progress import silence

FAILED, WRONG_INPUT, INTERRUPTED = 1, 2, 130

P = ParamSpec("P")


def reports_errors(verb: Callable[P, None]) -> Callable[P, None]:
    """Decorate a verb: a `MoeAdaptError` becomes one message on stderr, without a traceback.

    With `as_json` among the verb's options no progress is shown.
    """

    @functools.wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with silence(bool(kwargs.get("as_json"))), needs_extra():
                verb(*args, **kwargs)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None
        except TrainingStopped as stopped:
            typer.echo(str(stopped), err=True)
            raise typer.Exit(stopped.exit_code) from None
        except (ConfigError, UnsupportedError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(WRONG_INPUT) from None
        except MoeAdaptError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(FAILED) from None

    return run
