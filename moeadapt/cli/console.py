"""Where verbs write: results to stdout, what goes on to stderr, colours only on a terminal."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moeadapt.progress import spinner

if TYPE_CHECKING:
    from rich.console import Console

PIPE_WIDTH = 160
"""Columns of a table that goes to a file: rich would take 80."""


def result_console() -> "Console":
    """Return a console on stdout that prints text as it is; rich leaves colours out in a pipe."""
    from rich.console import Console

    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPE_WIDTH
    return console


@contextmanager
def working(label: str) -> Iterator[None]:
    """Show on stderr that something goes on, in place of what other libraries show of their own."""
    with libraries_quiet(), spinner(label):
        yield


@contextmanager
def libraries_quiet() -> Iterator[None]:
    """Turn the bars of transformers and of the hub off, and on again if they were on."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
    from huggingface_hub.utils import enable_progress_bars as enable_hub
    from transformers.utils import logging

    shown: list[Any] = []
    if logging.is_progress_bar_enabled():
        logging.disable_progress_bar()
        shown.append(logging.enable_progress_bar)
    if not are_progress_bars_disabled():
        disable_progress_bars()
        shown.append(enable_hub)
    try:
        yield
    finally:
        for show in shown:
            show()


def print_receipt(receipt: Any, out: str, as_json: bool) -> None:
    """Print what a written checkpoint holds and what was compared."""
    if as_json:
        print(json.dumps(receipt.to_dict(), indent=2))
        return
    print(receipt.text())
    print(f"wrote {out}")
