"""Whether progress is shown: only where a person watches, never beside machine-readable output."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_SILENT: ContextVar[bool] = ContextVar("silent", default=False)
_SPINNER: ContextVar[Any] = ContextVar("spinner", default=None)


def watched() -> bool:
    """Say whether bars on stderr have a reader: it is a terminal, and nobody asked for silence."""
    return not _SILENT.get() and sys.stderr is not None and sys.stderr.isatty()


@contextmanager
def silence(wanted: bool = True) -> Iterator[None]:
    """Show no progress inside, unless `wanted` is false."""
    token = _SILENT.set(wanted or _SILENT.get())
    try:
        yield
    finally:
        _SILENT.reset(token)


@contextmanager
def spinner(label: str) -> Iterator[None]:
    """Show on stderr that something goes on and for how long; nothing where nobody watches."""
    if not watched():
        yield
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    progress.add_task(label, total=None)
    token = _SPINNER.set(progress)
    try:
        with progress:
            yield
    finally:
        _SPINNER.reset(token)


@contextmanager
def alone() -> Iterator[None]:
    """Hide the spinner inside, where something else is shown on the same lines."""
    around = _SPINNER.get()
    if around is None:
        yield
        return
    around.stop()
    try:
        yield
    finally:
        around.start()
