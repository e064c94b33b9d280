"""Whether progress is shown: only where a person watches, never beside machine-readable output."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_SILENT: ContextVar[bool] = ContextVar("silent", default=False)


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
