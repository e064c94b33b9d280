"""A folder in the making: hidden, locked while its run lives, and given its name when complete."""

import errno
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moeadapt.errors import ConfigError, ExportError

try:
    import fcntl
except ImportError:  # not on Windows, where leftovers stay
    fcntl = None

ATTEMPTS = 10
"""Names tried; one is lost only if another run cleans up at that instant."""

FULL = (errno.ENOSPC, errno.EDQUOT)
OCCUPIED = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class HiddenFolder:
    """The folder beside `out_dir` that becomes it with `finish`, or goes away with `leave`.

    Attributes:
        path: where it is; `make` may choose another name.
    """

    def __init__(self, out_dir: Path) -> None:
        """Choose a name; makes nothing."""
        self._out_dir = out_dir
        self._lock: int | None = None
        self._finished = False
        self.path = self._name()

    def _name(self) -> Path:
        return self._out_dir.parent / f".{self._out_dir.name}.partial-{uuid.uuid4().hex[:8]}"

    def make(self) -> None:
        """Make the folder, and its parents, and lock it.

        Raises:
            ExportError: the disk does not take it.
        """
        with writing(self.path):
            self._out_dir.parent.mkdir(parents=True, exist_ok=True)
            for _ in range(ATTEMPTS):
                self.path.mkdir()
                if self._keep():
                    return
                self.path = self._name()
        raise ExportError(f"other runs keep removing what is made for {self._out_dir}; try again")

    def _keep(self) -> bool:
        """Lock the folder; False if the cleanup of another run came first."""
        try:
            self._lock = _lock(self.path)
            if self._lock is None:
                return False
            if os.path.samestat(os.fstat(self._lock), os.stat(self.path)):
                return True
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            # where nobody can lock, no cleanup removes anything either
            return True
        self._unlock()
        return False

    def finish(self) -> None:
        """Flush everything to disk and give the folder its name.

        Raises:
            ExportError: the place was taken in the meantime, or the disk does not take everything.
        """
        for folder, _, files in os.walk(self.path, topdown=False):
            for path in (*sorted(Path(folder, file) for file in files), Path(folder)):
                with writing(path):
                    sync(path)
        with writing(self._out_dir):
            try:
                os.rename(self.path, self._out_dir)
            except OSError as error:
                if error.errno not in OCCUPIED:
                    raise
                raise ExportError(
                    f"{self._out_dir} was taken while it was written: {error}; name a new folder"
                ) from error
        self._finished = True
        with writing(self._out_dir.parent):
            sync(self._out_dir.parent)

    def leave(self) -> None:
        """Let go of the folder; remove it unless it was finished."""
        if not self._finished:
            shutil.rmtree(self.path, ignore_errors=True)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


@contextmanager
def new_folder(out_dir: str | Path, need: int) -> Iterator[Path]:
    """Yield a hidden folder that becomes `out_dir` if nothing is raised, and vanishes otherwise.

    Args:
        out_dir: the folder to make.
        need: bytes that will be written.

    Raises:
        ConfigError: see `check_folder`; nothing is written.
        ExportError: see `HiddenFolder`.
    """
    out_dir = Path(os.path.abspath(out_dir))
    remove_leftovers(out_dir)
    check_folder(out_dir, need)
    hidden = HiddenFolder(out_dir)
    try:
        hidden.make()
        yield hidden.path
        hidden.finish()
    finally:
        hidden.leave()


def check_folder(out_dir: str | Path, need: int = 0) -> None:
    """Check that a folder can be made: the place is free and its disk has room.

    Args:
        out_dir: the folder.
        need: bytes that will be written.

    Raises:
        ConfigError: `out_dir` exists and is no empty folder, is a link, lies in a file, cannot be
            looked at, or its disk is too full.
    """
    out_dir = Path(os.path.abspath(out_dir))
    try:
        free = not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir()))
        above = next(parent for parent in out_dir.parents if parent.exists())
        link = out_dir.is_symlink()
    except OSError as error:
        raise ConfigError(f"cannot look at {out_dir}: {error}; name another folder") from error
    if link or not free:
        kind = "is a link" if link else "exists and is not an empty folder"
        raise ConfigError(f"{out_dir} {kind}; name a new one, or empty it")
    if not above.is_dir():
        raise ConfigError(f"{out_dir} lies in {above}, which is a file; name a place in a folder")
    room = shutil.disk_usage(above).free
    if room < need:
        raise ConfigError(
            f"{out_dir} needs {need / 1e9:.2f} GB and {above} has {room / 1e9:.2f} GB free; free "
            "some, or name a place on another disk"
        )


def remove_leftovers(out_dir: Path) -> None:
    """Remove the hidden folders that killed runs left beside `out_dir`; not those in use."""
    remove_hidden(out_dir.parent, glob.escape(out_dir.name))


def remove_hidden(parent: Path, pattern: str) -> None:
    """Remove what killed runs left in `parent` of folders whose names match `pattern`."""
    try:
        left = list(parent.glob(f".{pattern}.partial-*"))
    except OSError:
        return  # what cannot be listed cannot be removed either; writing there will say why
    for folder in left:
        try:
            lock = _lock(folder)
        except OSError:
            # finished and renamed since it was listed, another user's, or on a disk without locks
            continue
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def lock_folder(folder: Path) -> int | None:
    """Lock a folder; see `_lock`."""
    return _lock(folder)


def _lock(folder: Path) -> int | None:
    """Return an open file that locks `folder` while its process lives; None if another has it.

    Raises:
        OSError: it is gone or cannot be opened, or its disk has no locks.
    """
    if fcntl is None:
        raise OSError(errno.ENOSYS, "no locks")
    # A link, or a file of such a name, is nobody's leftover.
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    except OSError:
        os.close(file)
        raise
    return file


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the disk answers into an error that names `path` and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            hint = f"free space below {path.parent}, or write to another disk"
        elif error.errno == errno.EFBIG:
            hint = "this disk holds no file so large: lower max_shard_bytes"
        else:
            hint = "check that this folder can be written, or name another one"
        raise ExportError(f"cannot write {path}: {error.strerror or error}; {hint}") from error


def sync(path: Path) -> None:
    """Wait until a file, or the list of names of a folder, is on the disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
