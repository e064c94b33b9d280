"""Starts a process in which Triton runs kernels on the CPU.

Triton decides that when it is imported, which other tests have long done in this process.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any


def prepare() -> None:
    """Make the next import of Triton an interpreter, with the shape checks of the test suite."""
    os.environ["TRITON_INTERPRET"] = "1"
    import jaxtyping

    jaxtyping.install_import_hook("moeadapt", "beartype.beartype")


@contextmanager
def interpreter() -> Iterator[Callable[..., Any]]:
    """Yield what calls a function of a module in that process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=prepare) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()
