"""Cases 13, 86 and 95: a checkpoint whose files would hang or break a reader is passed over."""

import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moeadapt.doctor.examine import examine
from moeadapt.training import find_checkpoint
from moeadapt.training.checkpoint_files import MARKER, STATE
from tests.faults.loading_kit import SETTINGS, WEIGHTS
from tests.faults.training.kit import copy_run, run

SECONDS, BYTES = 20, 2 << 30


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints."""
    folder = tmp_path_factory.mktemp("saved")
    run(folder, max_steps=2).train()
    return folder


@pytest.fixture
def bounded() -> Iterator[None]:
    """Let a reader that hangs or reads without end fail."""

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"still reading after {SECONDS} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + BYTES, limits[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def pipe(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def endless(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/zero")

    return damage


def written(name: str, content: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(json.dumps(content)) and None


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "state is a pipe": (pipe(STATE), f"{STATE} .*is a pipe"),
    "settings are a pipe": (pipe(SETTINGS), f"{SETTINGS} cannot be read .*is a pipe"),
    "weights are a pipe": (pipe(WEIGHTS), f"{WEIGHTS} .*is a pipe"),
    "settings are endless": (endless(SETTINGS), f"{SETTINGS} .*is a link to /dev/zero"),
    "state is endless": (endless(STATE), f"{STATE} .*is a link to /dev/zero"),
    "settings are a list": (written(SETTINGS, [1]), f"{SETTINGS} .*is no object"),
    "state has another field": (
        written(STATE, {"global_step": 2, "x": 1}),
        r"does not know: \['x'\]",
    ),
    "state has no best": (
        written(STATE, {"global_step": 2, "best_model_checkpoint": 3}),
        "best_model_checkpoint that is no path",
    ),
    "half a character": (written(MARKER, {"files": {"\ud800": {}}}), f"{MARKER} is cut off"),
    "a count in words": (
        written(MARKER, {"files": {}, "skipped_steps": "two"}),
        f"{MARKER} is cut off",
    ),
}


@pytest.mark.parametrize("name", list(DAMAGE))
def test_fault_086_a_file_that_no_reader_foresees_is_passed_over_and_explained(
    name: str, saved: Path, tmp_path: Path, bounded: None
) -> None:
    damage, words = DAMAGE[name]
    folder = copy_run(saved, tmp_path / "run")
    (folder / "checkpoint-2" / MARKER).unlink()  # which would say it first
    damage(folder / "checkpoint-2")
    with pytest.warns(UserWarning, match=f"checkpoint-1, since .*-2 is not complete: .*{words}"):
        assert find_checkpoint(folder).endswith("checkpoint-1")
    found = [f for f in examine(folder) if f.level == "error"]
    assert any("checkpoint-2" in f.what for f in found), found
    assert all(f.what.encode() for f in found)  # a terminal can show it
