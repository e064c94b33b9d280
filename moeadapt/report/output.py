"""The files of a report: where they go, whose they may replace, and how they get there whole."""

import os
import re
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path

from moeadapt.errors import ConfigError
from moeadapt.hidden_folder import writing

SUFFIXES = (".html", ".htm")
MARK = re.compile(rb'<meta name="generator" content="moeadapt [^"]*">')
MARK_WITHIN = 4096
"""Bytes at the start of a page in which the mark has to be."""


def json_path(out: Path) -> Path:
    """Return where the numbers go."""
    return out.with_suffix(".json")


def pictures_folder(out: Path) -> Path:
    """Return where the pictures go."""
    return out.with_name(f"{out.stem}_files")


def check_out(out: Path) -> None:
    """Check that a report may be written.

    Args:
        out: the page; its numbers and its pictures go beside it.

    Raises:
        ConfigError: `out` is no HTML name, a link, a folder, or a file that is no report; or there
            is no report but something where its numbers or pictures would go.
    """
    if out.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{out} is no page; give a name that ends in .html")
    folder, numbers = pictures_folder(out), json_path(out)
    try:
        for path in (out, numbers, folder):
            if path.is_symlink():
                raise ConfigError(f"{path} is a link; name another report")
        if out.is_dir() or numbers.is_dir():
            raise ConfigError(
                f"{out if out.is_dir() else numbers} is a folder; name another report"
            )
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder} is a file; remove it, or name another report")
        above = next(parent for parent in out.absolute().parents if parent.exists())
        if not above.is_dir():
            raise ConfigError(f"{out} lies in {above}, which is a file; name a place in a folder")
        if out.exists():
            if not is_report(out):
                raise ConfigError(
                    f"{out} exists and is no report of moeadapt; remove it, or name another file"
                )
            return
        taken = [path for path in (numbers, folder) if path.exists()]
    except OSError as error:
        raise ConfigError(f"cannot look at {out}: {error}; name another file") from error
    if taken:
        raise ConfigError(
            f"{taken[0]} exists, but the report {out} that it would belong to does not; remove it, "
            "or name another report"
        )


def is_report(path: Path) -> bool:
    """Return whether a file is a report that this package wrote."""
    with path.open("rb") as file:
        return MARK.search(file.read(MARK_WITHIN)) is not None


def write_files(
    out: Path, html: str, numbers: str, pictures: Mapping[str, bytes], known: Collection[str]
) -> list[Path]:
    """Write all files; each is either the old one or the new one, never half of it.

    Args:
        out: the page.
        html: its text.
        numbers: text of the JSON file.
        pictures: file name -> content.
        known: file names of pictures; those of an older report that are not in `pictures` go away.

    Returns:
        The paths, the page first.

    Raises:
        ExportError: the disk does not take it; the old report is then still there.
    """
    folder = pictures_folder(out)
    content = {out: html.encode(), json_path(out): numbers.encode()}
    content |= {folder / name: data for name, data in pictures.items()}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    hidden: dict[Path, Path] = {}
    try:
        # All bytes are on the disk before the first name changes.
        for path, data in content.items():
            hidden[path] = path.with_name(f".{path.name}.partial-{uuid.uuid4().hex[:8]}")
            with writing(path):
                _write(hidden[path], data)
        # The page first: it marks what is beside it as ours, should the rest be cut off.
        for path, partial in hidden.items():
            with writing(path):
                os.replace(partial, path)
    finally:
        for partial in hidden.values():
            partial.unlink(missing_ok=True)
    for name in known:
        if name not in pictures:
            (folder / name).unlink(missing_ok=True)
    return list(content)


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
