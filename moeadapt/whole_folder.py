"""Puts finished files in the place of older ones, so that a reader finds the old or the new state.

Files are written into a hidden folder first. They get their names when they are complete and on the
disk: a new folder by one rename, a folder of files by one exchange of both, and files in a folder
that holds more (checkpoints, say) one by one, out of a journal: see `moeadapt.journal`.
"""

import ctypes
import errno
import glob
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moeadapt.errors import ConfigError
from moeadapt.hidden_folder import HiddenFolder, remove_hidden, sync, writing
from moeadapt.journal import put_files, recover, start_journal

CARD = "README.md"
"""Is updated, not written anew, so the old one has to be there."""

_HIDDEN = re.compile(r"\..+\.partial-[0-9a-f]{8}")

_CUT_MANIFEST = re.compile(r"\.moeadapt_manifest\.json\.(partial-[0-9a-f]{8}|\d+)")
"""A manifest that a killed process was writing; one in the making lies in a hidden folder."""

_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV, errno.EBUSY, errno.EPERM)


@contextmanager
def whole_folder(target: str | Path) -> Iterator[Path]:
    """Yield a hidden folder whose files get their places in `target` if nothing is raised.

    Args:
        target: an adapter's folder, new or not; other files in it stay.

    Raises:
        ConfigError: `target` is a file.
        ExportError: the disk does not take it; `target` is as it was.
        AdapterFileError: the disk takes the files, but not in their places; the message says where
            they are. Or an earlier save cannot be completed, see `moeadapt.journal.recover`.
    """
    target = Path(os.path.realpath(target))
    if any(_HIDDEN.fullmatch(part) for part in target.parts):
        # Somebody above is about to give it its name.
        with writing(target):
            target.mkdir(parents=True, exist_ok=True)
        yield target
        return
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file, and an adapter is a folder; name another place")
    recover(target)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_cut_manifests(target)
        holds_folders = target.is_dir() and any(path.is_dir() for path in target.iterdir())
    # Beside a folder that holds folders nothing is gained: it cannot be exchanged. Nor may the one
    # that this process works in be: its processes would be left in a folder that is gone.
    inside = (
        holds_folders
        or _is_worked_in(target)
        or (target.is_dir() and not os.access(target.parent, os.W_OK))
    )
    place = target / "adapter" if inside else target
    remove_hidden(target, "adapter")
    remove_hidden(target.parent, glob.escape(target.name))
    hidden = HiddenFolder(place)
    try:
        hidden.make()
        with writing(target):
            if (target / CARD).is_file():
                shutil.copyfile(target / CARD, hidden.path / CARD)
        yield hidden.path
        give_modes(hidden.path)
        sync_all(hidden.path)
        with writing(target):
            _put_adapter(hidden.path, target)
    finally:
        hidden.leave()


def put_folder(folder: Path, target: Path) -> None:
    """Give a complete `folder` the name `target`; what had it is left in the place of `folder`.

    Both lie on one disk. Where the system cannot exchange two folders, `target` is missing for a
    moment.

    Raises:
        OSError: the disk does not take it.
    """
    if not target.exists():
        os.rename(folder, target)
    elif not _exchange(folder, target):
        aside = folder.with_name(f"{folder.name}.old")
        os.rename(target, aside)
        os.rename(folder, target)
    sync(target.parent)


def give_modes(folder: Path) -> None:
    """Give private files the mode that a new file has here: safetensors makes them 0600.

    Raises:
        ExportError: the disk does not take it.
    """
    with writing(folder):
        probe = folder / ".mode"
        # What a new file gets is the umask's answer, or that of the folder's access list.
        os.close(os.open(probe, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o666))
        mode = probe.stat().st_mode & 0o777
        probe.unlink()
        for path in folder.rglob("*"):
            if path.is_file() and path.stat().st_nlink == 1:
                path.chmod(mode)


def sync_all(folder: Path) -> None:
    """Wait until everything in `folder` is on the disk.

    Raises:
        ExportError: the disk does not take it.
    """
    for place, _, files in os.walk(folder, topdown=False):
        for path in (*(Path(place, name) for name in sorted(files)), Path(place)):
            with writing(path):
                sync(path)


def _put_adapter(folder: Path, target: Path) -> None:
    if not target.exists():
        os.rename(folder, target)
    elif folder.parent == target or not _exchange_files(folder, target):
        put_files(start_journal(folder, target))
    sync(target.parent)


def _is_worked_in(target: Path) -> bool:
    try:
        return target.samefile(os.getcwd())
    except OSError:
        return False


def _remove_cut_manifests(target: Path) -> None:
    for path in target.iterdir() if target.is_dir() else ():
        if _CUT_MANIFEST.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _exchange_files(folder: Path, target: Path) -> bool:
    """Exchange two folders of files, after `folder` has got the other files of `target`."""
    kept = [path for path in target.iterdir() if not (folder / path.name).exists()]
    for path in kept:
        try:
            os.link(path, folder / path.name, follow_symlinks=False)
        except OSError:
            shutil.copy2(path, folder / path.name, follow_symlinks=False)
    shutil.copymode(target, folder)
    if _exchange(folder, target):
        return True
    for path in kept:
        (folder / path.name).unlink()
    return False


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0:
        return True
    if (code := ctypes.get_errno()) in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))
