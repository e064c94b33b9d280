"""The folder of a run: it can be written, and no other run writes into it."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from moeadapt.errors import ConfigError, TrainingError

LOCK = ".moeadapt.lock"
"""Is held while a run trains; the file itself stays."""


def check_output_dir(output_dir: str | Path) -> Path:
    """Make the folder, with its parents, and write into it, before anything expensive happens.

    Raises:
        ConfigError: it is a file or lies in one, its name is too long, or it cannot be written.
    """
    folder = Path(os.path.abspath(output_dir))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A folder may allow a look and refuse a file.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        name = str(folder) if len(str(folder)) < _LONG else f"{str(folder)[:_LONG]}..."
        raise ConfigError(
            f"output_dir={name!r} cannot be used: {error.strerror or error}; name a folder that "
            "can be made and written"
        ) from error
    return folder


_LONG = 300


@contextmanager
def alone_in(output_dir: str | Path) -> Iterator[None]:
    """Hold the lock of a run's folder.

    Raises:
        ConfigError: see `check_output_dir`.
        TrainingError: another run holds it.
    """
    folder = check_output_dir(output_dir)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise TrainingError(
            f"another run trains into {folder} at the moment, and two would overwrite each other's "
            "checkpoints; wait for it, or name another output_dir"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{folder / LOCK} cannot be locked: {error}. Without a lock two runs could overwrite "
            "each other's checkpoints; name an output_dir on a disk that has locks"
        ) from error
    try:
        yield
    finally:
        lock.release()
