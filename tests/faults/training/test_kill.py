"""Case 89: SIGKILL at random points of a save."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-W", "ignore", "-m", "tests.faults.training.killed"]


@pytest.mark.parametrize("points", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_fault_089_a_killed_run_leaves_a_complete_checkpoint_and_no_orphans(
    points: int, tmp_path: Path
) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "tests.faults.training.killed",
            str(tmp_path),
            str(points),
        ],
        cwd=Path(__file__).parents[3],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["killed"] == points
    # A kill that never falls into a save would show nothing.
    assert found["unfinished"] >= points // 6
