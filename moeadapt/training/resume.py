"""Chooses the checkpoint that a run goes on from, or says why it cannot go on."""

import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from moeadapt.errors import ConfigError, TrainingError
from moeadapt.training.checkpoint_files import (
    OPTIMIZER,
    SCHEDULER,
    Findings,
    inspect_checkpoint,
)

_NAME = re.compile(r"checkpoint-(\d+)")

_PARTIAL = (
    "allow_partial_resume=True goes on without them, with fresh ones, and the result will differ "
    "from that of an uninterrupted run"
)


def find_checkpoint(
    output_dir: str | Path,
    *,
    needs: Iterable[str] = (OPTIMIZER, SCHEDULER, "rng_state.pth"),
    sharded: bool = False,
    allow_partial: bool = False,
) -> str:
    """Return the newest complete checkpoint of a run; warns of newer ones that are not.

    For a stock trainer: `trainer.train(resume_from_checkpoint=find_checkpoint(output_dir))`. Those
    of moeadapt.training do it themselves.

    Args:
        output_dir: the run's folder.
        needs: files with the trainer's state that must be there.
        sharded: see `inspect_checkpoint`.
        allow_partial: go on although some of `needs` are missing; warns of them.

    Raises:
        ConfigError: there is no checkpoint.
        TrainingError: none is complete, or the newest lacks state, or asks for code to be run.
    """
    folders = list_checkpoints(output_dir)
    if not folders:
        raise ConfigError(
            f"{output_dir} has no checkpoint to resume from; leave resume_from_checkpoint out, or "
            "name another folder"
        )
    passed: list[str] = []
    for folder in folders:
        found = inspect_checkpoint(folder, needs, sharded=sharded)
        if found.damaged and not found.hostile:
            passed.append(_say(folder, found))
            continue
        _accept(folder, found, allow_partial)
        if passed:
            warnings.warn(
                f"resuming from {folder}, since {'; '.join(passed)}. The steps after it are "
                "repeated, and their checkpoints replaced",
                stacklevel=2,
            )
        return str(folder)
    raise TrainingError(
        f"no checkpoint in {output_dir} is complete: {'; '.join(passed)}. Start again without "
        "resume_from_checkpoint, or restore a checkpoint from a backup"
    )


def check_checkpoint(
    folder: str | Path, needs: Iterable[str], *, sharded: bool = False, allow_partial: bool = False
) -> str:
    """Return `folder` if a run can go on from it.

    Args:
        folder: a checkpoint that was asked for by name.
        needs: see `find_checkpoint`.
        sharded: see `inspect_checkpoint`.
        allow_partial: see `find_checkpoint`.

    Raises:
        ConfigError: it is no folder.
        TrainingError: it is damaged, lacks state, or asks for code to be run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"resume_from_checkpoint={str(folder)!r} is no folder")
    needs = list(needs)
    found = inspect_checkpoint(folder, needs, sharded=sharded)
    if found.damaged and not found.hostile:
        others = (one for one in list_checkpoints(folder.parent) if one != folder)
        whole = (o for o in others if inspect_checkpoint(o, needs, sharded=sharded).complete)
        instead = next((f"; {other} is complete" for other in whole), "")
        raise TrainingError(
            f"{_say(folder, found)}{instead}. Name a complete checkpoint, or resume from the last "
            "one with resume_from_checkpoint=True"
        )
    _accept(folder, found, allow_partial)
    return str(folder)


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the checkpoints of a run, the newest first, complete or not."""
    output_dir = Path(output_dir)
    if not output_dir.is_dir():
        return []
    found = [(_NAME.fullmatch(path.name), path) for path in output_dir.iterdir()]
    steps = [(int(match[1]), path) for match, path in found if match and path.is_dir()]
    return [path for _, path in sorted(steps, reverse=True)]


def last_complete(output_dir: str | Path) -> Path | None:
    """Return the newest checkpoint that holds a trained state; None if there is none."""
    folders = list_checkpoints(output_dir)
    return next((one for one in folders if not inspect_checkpoint(one, ()).damaged), None)


def refuse_changes(folder: str, adapter: Sequence[str], run: Sequence[str], allow: bool) -> None:
    """Refuse to go on with other settings than the run had.

    Args:
        folder: the checkpoint.
        adapter: differences of the adapter's settings.
        run: differences of data and batches.
        allow: go on although `run` differs; warns of it.

    Raises:
        TrainingError: something differs, and is not allowed to.
    """
    lines = [*adapter, *run]
    if not lines:
        return
    diff = "".join(f"\n  {line}" for line in lines)
    if adapter or not allow:
        hint = (
            "or start a new run in another output_dir"
            if adapter
            else "or pass allow_partial_resume=True to go on with the new ones"
        )
        raise TrainingError(
            f"{folder} belongs to a run with other settings (then -> now):{diff}\nResume with "
            f"those it was started with, {hint}"
        )
    warnings.warn(f"going on from {folder} with other settings (then -> now):{diff}", stacklevel=2)


def _accept(folder: Path, found: Findings, allow_partial: bool) -> None:
    if found.hostile:
        raise TrainingError(
            f"{folder} is refused: {', '.join(found.hostile)} holds more than tensors and plain "
            "data, and could run code. Nothing of it was run. Do not use this checkpoint unless "
            "you know who wrote it; resume from another one by its path"
        )
    if not found.missing:
        return
    lacking = ", ".join(found.missing)
    if not allow_partial:
        raise TrainingError(f"{folder} has no {lacking}. Restore the files; or {_PARTIAL}")
    warnings.warn(f"{folder} has no {lacking}; going on with fresh state", stacklevel=3)


def _say(folder: Path, found: Findings) -> str:
    more = f" and {len(found.damaged) - 1} more problems" if len(found.damaged) > 1 else ""
    return f"{folder} is not complete: {found.damaged[0]}{more}"
