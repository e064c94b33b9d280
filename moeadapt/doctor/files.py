"""Checks of what lies in a folder, whatever the files hold: pickles, links, modes, leftovers."""

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from moeadapt.adapter_format.settings import MANIFEST, PICKLED, SETTINGS, WEIGHTS
from moeadapt.doctor.finding import Finding, Subject
from moeadapt.journal import JOURNAL

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")

OF_TRAINER = re.compile(
    r"(optimizer|scheduler|scaler)\.pt|rng_state(_\d+)?\.pth|training_args\.bin"
)
"""What a checkpoint holds; looked at by the check `checkpoint`."""

LEFTOVER = re.compile(
    rf"\..+\.partial-[0-9a-f]{{8}}(\.old)?|\.{re.escape(MANIFEST)}\.\d+|\..+\.partial|\.mode"
)
"""What a save that was killed leaves."""


def present(subject: Subject) -> Iterator[Finding]:
    """See whether there is anything to load."""
    folder = subject.place
    runs = sorted(folder.glob("checkpoint-*"))
    if (folder / SETTINGS).exists() or runs:
        return
    yield Finding(
        check="files",
        level="error",
        what=f"{folder}: holds neither {SETTINGS} nor a checkpoint",
        why="without it there is no adapter",
        cure="give the folder of an adapter saved with model.save_pretrained, or of a training run",
    )


def pickles(subject: Subject) -> Iterator[Finding]:
    """Find pickled files; the trainer's own are looked at elsewhere."""
    for path in _entries(subject.place):
        if path.suffix not in PICKLES or OF_TRAINER.fullmatch(path.name):
            continue
        alone = path.name == PICKLED and not (subject.place / WEIGHTS).exists()
        yield Finding(
            check="pickles",
            level="error" if alone else "warning",
            what=f"{str(path)!r} is a pickled file" + (f", and there is no {WEIGHTS}" * alone),
            why="reading one can run code: it is never opened here, but other programs may",
            cure="convert it where you trust it" if alone else "delete it if nothing needs it",
        )


def links(subject: Subject) -> Iterator[Finding]:
    """Find links that leave the folder, or the hub's cache around it."""
    folder = subject.place.resolve()
    allowed = [folder]
    for above in (folder, *folder.parents):
        if above.name == "snapshots" and above.parent.name.startswith("models--"):
            allowed.append(above.parent / "blobs")
    for path in _entries(subject.place):
        if not path.is_symlink():
            continue
        target = Path(os.path.realpath(path))
        if target.exists() and any(target.is_relative_to(root) for root in allowed):
            continue
        ours = path.name in (SETTINGS, WEIGHTS, MANIFEST)
        yield Finding(
            check="links",
            level="error" if ours else "warning",
            what=f"{str(path)!r} is a link to {str(target)!r}, "
            + ("outside the folder" if target.exists() else "which does not exist"),
            why="a folder from elsewhere could show any file of this machine as its own",
            cure="put a copy of the file there if it is the right one, else delete the link",
        )


def modes(subject: Subject) -> Iterator[Finding]:
    """Find what others may change, and weights that fewer may read than the settings."""
    for path in (subject.place, *_entries(subject.place)):
        mode = path.lstat().st_mode
        sticky = stat.S_ISDIR(mode) and mode & stat.S_ISVTX
        if mode & stat.S_IWOTH and not stat.S_ISLNK(mode) and not sticky:
            yield Finding(
                check="modes",
                level="warning",
                what=f"{str(path)!r} can be changed by every user (mode {mode & 0o777:o})",
                why="another user can exchange the adapter",
                cure=f"chmod o-w {str(path)!r}",
            )
    settings, weights = subject.place / SETTINGS, subject.place / WEIGHTS
    if settings.is_file() and weights.is_file():
        hidden = settings.stat().st_mode & ~weights.stat().st_mode & 0o044
        if hidden:
            yield Finding(
                check="modes",
                level="warning",
                what=f"{str(weights)!r} can be read by fewer users than {SETTINGS} beside it",
                why="other users cannot load the adapter; safetensors alone writes it like this",
                cure=f"chmod --reference={SETTINGS} {WEIGHTS}, or save it again",
            )


def leftovers(subject: Subject) -> Iterator[Finding]:
    """Find what a save that was killed has left in the folder and beside it."""
    folder = Path(os.path.abspath(subject.place))
    beside = [p for p in _entries(folder.parent) if p.name.startswith(f".{folder.name}.partial-")]
    for path in (*_entries(folder), *beside):
        if JOURNAL.fullmatch(path.name):
            yield Finding(
                check="leftovers",
                level="warning",
                what=f"{str(path)!r} holds the files of a save that was cut, or is at work now",
                why="some of the adapter's files may still be the older ones",
                cure="load the adapter, or save to it: either completes the save",
            )
        if LEFTOVER.fullmatch(path.name):
            yield Finding(
                check="leftovers",
                level="warning",
                what=f"{str(path)!r} was left by a save that was cut, or is being written now",
                why="it takes room, and is not complete",
                cure="delete it if no process saves here now; the next save may do it, too",
            )


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []
