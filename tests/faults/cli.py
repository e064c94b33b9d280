"""Runs the command line as a user does, and takes what it said."""

import atexit
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]

MAIN = "from moeadapt.cli import main; main()"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a call of the command line left."""

    code: int
    out: str
    err: str


def call(*args: str) -> Answer:
    """Call the command line in a process that all calls share."""
    process = _shared_process()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(args) + "\n")
    process.stdin.flush()
    return Answer(**json.loads(process.stdout.readline()))


@cache
def _shared_process() -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-B", "-W", "ignore", "-m", "tests.faults.cli_process"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )

    def end() -> None:
        process.communicate(timeout=60)

    atexit.register(end)
    return process


def spawn(*args: str, cwd: Path | None = None, encoding: str = "utf-8", **env: str) -> Answer:
    """Call it in a process of its own, with nothing of this one's terminal."""
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "OMP_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-B", "-W", "ignore", "-c", MAIN, *args],
        capture_output=True,
        cwd=cwd,
        timeout=120,
        env={**kept, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **env},
    )
    return Answer(
        code=done.returncode, out=done.stdout.decode(encoding), err=done.stderr.decode(encoding)
    )
