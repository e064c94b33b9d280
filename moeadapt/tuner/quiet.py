"""Builds something for a look at it, without its warnings."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def without_warnings() -> Iterator[None]:
    """Silence warnings inside; the object that is kept warns when it is built.

    Python keeps one list of filters for all threads. Two threads that saved and restored it in
    turns could leave it silenced for ever, so only one is in here at a time.
    """
    with _ONE_AT_A_TIME, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
