"""A bar on stderr for work that takes over two seconds; nothing for work that does not."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from moeadapt.progress import watched

PATIENCE = 2.0
"""Seconds before a bar appears."""


class Bytes:
    """Counts bytes, and shows them once `PATIENCE` is over."""

    def __init__(self, progress: Progress, task: int) -> None:
        """Hold the bar, not shown yet."""
        self._progress, self._task = progress, task
        self._begin = time.monotonic()
        self._shown = False

    def add(self, count: int) -> None:
        """Add `count` bytes."""
        self._progress.advance(self._task, count)  # type: ignore[arg-type]
        if not self._shown and time.monotonic() - self._begin > PATIENCE:
            self._progress.start()
            self._shown = True


@contextmanager
def byte_progress(title: str, total: int) -> Iterator[Bytes]:
    """Yield a counter of `total` bytes; the bar goes away at the end."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    progress = Progress(*columns, console=console, transient=True, disable=not watched())
    counter = Bytes(progress, progress.add_task(title, total=total))
    try:
        yield counter
    finally:
        progress.stop()
