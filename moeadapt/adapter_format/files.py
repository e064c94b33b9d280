"""Opens one file of an adapter's folder: regular, inside the folder, once."""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from moeadapt.errors import AdapterFileError


def open_file(folder: Path, name: str) -> BinaryIO:
    """Open `folder/name` for reading: what is checked then is what is read then.

    Raises:
        AdapterFileError: it is no regular file (a folder, a pipe, a device), a link that leaves the
            folder, or cannot be read.
    """
    path = folder / name
    target = _resolve(folder, path)
    try:
        # Without waiting for a writer, should it be a pipe.
        file = os.open(target, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _NO_LINKS)
    except OSError as error:
        raise AdapterFileError(
            f"{path}: cannot be read: {error.strerror or error}; check the path and its permissions"
        ) from None
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise AdapterFileError(
            f"{path}: is {_kind(target)}, not a file; copy the adapter again from its source"
        )
    return os.fdopen(file, "rb")


_NO_LINKS = getattr(os, "O_NOFOLLOW", 0)


def exists(folder: Path, name: str) -> bool:
    """Whether anything stands at `folder/name`, be it a broken link."""
    return os.path.lexists(folder / name)


def read_small(folder: Path, name: str, limit: int) -> bytes:
    """Return the content of a file of at most `limit` bytes.

    Raises:
        AdapterFileError: see `open_file`, or it is empty or larger.
    """
    with open_file(folder, name) as file:
        # `read` makes room for all that it is asked for.
        content = file.read(min(os.fstat(file.fileno()).st_size, limit) + 1)
    if not content:
        raise AdapterFileError(f"{folder / name}: is empty; copy the adapter again")
    if len(content) > limit:
        raise AdapterFileError(
            f"{folder / name}: is larger than {limit} bytes, which no adapter needs; this is not a "
            "file that moeadapt wrote"
        )
    return content


def _resolve(folder: Path, path: Path) -> Path:
    """Return where `path` really is; links must stay in the folder, or in its hub cache."""
    try:
        inside, target = folder.resolve(), path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise AdapterFileError(f"{path}: cannot be followed: {error}") from None
    allowed = [inside]
    # models--owner--name/snapshots/<commit>/... links to models--owner--name/blobs/...
    for above in (inside, *inside.parents):
        if above.name == "snapshots" and above.parent.name.startswith("models--"):
            allowed.append(above.parent / "blobs")
    if not any(target.is_relative_to(root) for root in allowed):
        raise AdapterFileError(
            f"{path}: is a link to {target}, outside the adapter's folder; put a copy of the file "
            "there if it is the right one"
        )
    return target


def _kind(path: Path) -> str:
    mode = path.lstat().st_mode
    kinds = {
        "a folder": stat.S_ISDIR,
        "a pipe": stat.S_ISFIFO,
        "a device": stat.S_ISCHR,
        "a block device": stat.S_ISBLK,
        "a socket": stat.S_ISSOCK,
    }
    return next((kind for kind, is_kind in kinds.items() if is_kind(mode)), "something else")
