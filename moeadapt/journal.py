"""Puts complete files in the place of older ones, one by one, so that a cut is made good later.

Where two folders cannot be exchanged, files are replaced one by one. All of them lie in a journal
first, `.adapter.complete-<hex>` in the folder that gets them, and its name says that nothing is
missing. Who finds one of a process that lives no more puts the rest of it in place.
"""

import errno
import os
import re
import shutil
import time
from pathlib import Path

from moeadapt.errors import AdapterFileError
from moeadapt.hidden_folder import NO_LOCKS, lock_folder, sync

LAST = "adapter_config.json"
"""Without it no reader takes the other files for an adapter."""

JOURNAL = re.compile(r"\.adapter\.complete-[0-9a-f]{8}")

PATIENCE = 10.0
"""Seconds to wait for a process that is putting its files in place; it takes milliseconds."""


def start_journal(folder: Path, target: Path) -> Path:
    """Make a folder of complete files, all on the disk, the journal of `target`.

    From here on the new state is the one that counts.

    Raises:
        OSError: the disk does not take it, or a file is where a folder belongs; nothing changed.
    """
    _check_fits(folder, target)
    journal = target / f".adapter.complete-{folder.name[-8:]}"
    above = folder.parent
    os.rename(folder, journal)
    sync(target)
    if above != target:
        sync(above)
    return journal


def put_files(journal: Path) -> None:
    """Put what is in `journal` into the folder around it, and remove the journal.

    Raises:
        AdapterFileError: it cannot be done here; the journal stays.
    """
    target = journal.parent
    effective = os.access in os.supports_effective_ids
    try:
        for folder in (journal, target):
            if not os.access(folder, os.W_OK, effective_ids=effective):
                raise PermissionError(errno.EACCES, f"{folder} cannot be written")
        _check_fits(journal, target)
        _put(journal, target)
    except OSError as error:
        raise AdapterFileError(
            f"{target}: a save was cut here, and its files cannot be put in place: "
            f"{error.strerror or error}. They are complete in {journal}: copy them over those in "
            f"{target} and delete {journal.name}, as a user who may write there; then load again"
        ) from error
    shutil.rmtree(journal, ignore_errors=True)


def recover(folder: str | Path) -> None:
    """Complete the saves to an adapter's folder that were cut; without one nothing is done.

    Args:
        folder: of the adapter; it may lie in the folder that was saved to.

    Raises:
        AdapterFileError: a save cannot be completed here, or another process is at it.
    """
    try:
        folder = Path(os.path.realpath(folder))
        found = _journals(folder)
        found += [one for one in _journals(folder.parent) if (one / folder.name).is_dir()]
    except (OSError, ValueError):
        return  # there is no such folder, and the reader says so
    for journal in found:
        _complete(journal)


def _journals(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(
            Path(entry.path)
            for entry in entries
            if JOURNAL.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
        )


def _complete(journal: Path) -> None:
    end = time.monotonic() + PATIENCE
    lock: int | None = None
    while lock is None:
        try:
            lock = lock_folder(journal)
        except FileNotFoundError:
            return  # the one who saves has finished
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise AdapterFileError(
                    f"{journal}: a save was cut here, and its files cannot be read: {error}; ask "
                    f"their owner to copy them over those in {journal.parent}"
                ) from error
            break  # two that put the same files in place do no harm
        if lock is None and time.monotonic() > end:
            raise AdapterFileError(
                f"{journal.parent}: another process has been saving here for {PATIENCE:.0f} s; "
                "load it, or save to it, again when that process is done"
            )
        if lock is None:
            time.sleep(0.02)
    try:
        if journal.is_dir():
            _refuse_links(journal)
            put_files(journal)
    finally:
        if lock is not None:
            os.close(lock)


def _refuse_links(journal: Path) -> None:
    """Refuse to follow links: a folder from elsewhere could move files of this machine.

    Raises:
        AdapterFileError: there is one in the journal, or where one of its folders belongs.
    """
    for place, folders, files in os.walk(journal):
        there = journal.parent / Path(place).relative_to(journal)
        wanted = [*(Path(place, name) for name in (*folders, *files))]
        wanted += [there / name for name in folders]
        for path in wanted:
            if path.is_symlink():
                raise AdapterFileError(
                    f"{path} is a link, so the save that was cut in {journal.parent} is not "
                    f"completed; copy the files of {journal.name} by hand, and delete it"
                )


def _check_fits(folder: Path, target: Path) -> None:
    """See that no file gets the place of a folder, and no folder that of a file.

    Raises:
        OSError: one would.
    """
    for place, folders, files in os.walk(folder):
        there = target / Path(place).relative_to(folder)
        for name in folders:
            if (there / name).exists() and not (there / name).is_dir():
                raise NotADirectoryError(errno.ENOTDIR, f"{there / name} is a file")
        for name in files:
            if (there / name).is_dir():
                raise IsADirectoryError(errno.EISDIR, f"{there / name} is a folder")


def _put(folder: Path, target: Path) -> None:
    """Replace file by file; where the settings change, there are none in the meantime."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == LAST):
        place = target / path.name
        if path.is_dir():
            if place.is_dir():
                _put(path, place)
            else:
                os.rename(path, place)
            continue
        settings, old = folder / LAST, target / LAST
        both = settings.is_file() and old.is_file()
        if both and path != settings and settings.read_bytes() != old.read_bytes():
            old.unlink()
        os.replace(path, place)
    sync(target)
