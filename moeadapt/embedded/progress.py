"""One progress bar, or none."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from moeadapt.progress import alone, watched


@contextmanager
def progress_bar(
    label: str, total: int, *, shown: bool, in_bytes: bool = False
) -> Iterator[Callable[[int], None]]:
    """Yield `show(done)`, which moves a bar on stderr, or does nothing if there is none.

    Args:
        label: what is being done, for a person.
        total: the amount at which the bar is full.
        shown: false for silence; where nobody watches there is no bar either.
        in_bytes: whether amounts are bytes; otherwise they are counts.
    """
    if not (shown and watched()):
        yield lambda done: None
        return
    from rich import progress
    from rich.console import Console

    amount = progress.DownloadColumn() if in_bytes else progress.MofNCompleteColumn()
    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), amount)
    # stderr, so that machine-readable output on stdout stays clean.
    with alone(), progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.update(task, completed=min(done, total))
