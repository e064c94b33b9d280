"""Checks of checkpoints: whether a run can go on from them."""

from collections.abc import Iterator
from pathlib import Path

from moeadapt.doctor.finding import Finding, Subject


def checkpoints(subject: Subject) -> Iterator[Finding]:
    """Look at the folder if it is a checkpoint, and at each one in it."""
    from moeadapt.training.checkpoint_files import MARKER, OPTIMIZER, SCHEDULER, STATE
    from moeadapt.training.checkpoint_files import inspect_checkpoint as inspect
    from moeadapt.training.resume import list_checkpoints

    place = subject.place
    # What a finished run saves beside its checkpoints has a state, too, and nothing to resume from.
    resumes = place.name.startswith("checkpoint-") or (place / OPTIMIZER).exists()
    own = [place] if (place / MARKER).exists() or ((place / STATE).exists() and resumes) else []
    for folder in (*own, *list_checkpoints(place)):
        random = sorted(path.name for path in folder.glob("rng_state*.pth")) or ["rng_state.pth"]
        found = inspect(folder, (OPTIMIZER, SCHEDULER, *random))
        yield from _findings(folder, found.damaged, found.missing, found.hostile)
        if not (folder / MARKER).exists():
            yield Finding(
                check="checkpoint",
                level="warning",
                what=f"{folder}: has no {MARKER}",
                why="it cannot be told whether the save was complete, and whether files changed",
                cure="nothing, if the run was not ours; ours writes it last",
            )
        elif found.complete:
            yield Finding(check="checkpoint", level="ok", what=f"{folder}: is complete")


def _findings(
    folder: Path, damaged: list[str], missing: list[str], hostile: list[str]
) -> Iterator[Finding]:
    for text in damaged:
        yield Finding(
            check="checkpoint",
            level="error",
            what=f"{folder}: {text}",
            why="a run that resumes passes it over",
            cure="resume from an older checkpoint, and delete this one",
        )
    for name in missing:
        yield Finding(
            check="checkpoint",
            level="warning",
            what=f"{folder}: has no {name}",
            why="a resumed run would not be the one that was stopped, and is refused",
            cure="resume from a complete checkpoint, or with allow_partial_resume=True",
        )
    for name in hostile:
        yield Finding(
            check="checkpoint",
            level="error",
            what=f"{folder / name}: holds more than tensors and plain data",
            why="it asks for code to be run; it was not, and resuming from it is refused",
            cure="delete the checkpoint, and find out where it comes from",
        )
