"""Kills training runs while they save, and looks at what is left; in a process of its own.

Run as `python -m tests.faults.training.killed FOLDER COUNT`. It forks, so that the libraries are
imported once, and never trains itself: autograd does not survive a fork.
"""

import gc
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from moeadapt.training import find_checkpoint
from moeadapt.training.checkpoint_files import inspect_checkpoint
from tests.faults.training.kit import hidden, run

STEPS, KEPT = 30, 2


class Report(TrainerCallback):
    """Writes each step whose save has returned; then kills at one of the next audit events."""

    def __init__(self, pipe: int, events: int | None) -> None:
        self.pipe, self.left = pipe, events

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        os.write(self.pipe, state.global_step.to_bytes(1))
        if state.global_step == KEPT and self.left is not None:
            sys.addaudithook(self.count)

    def count(self, event: str, args: Any) -> None:
        """Count what Python does to files: opens, makes, renames, removes."""
        if event == "open" or event.startswith(("os.", "shutil.")):
            self.left -= 1
            if self.left == -1:  # the kill is an event, too
                os.kill(os.getpid(), signal.SIGKILL)


def fork(work: Callable[[], None]) -> int:
    """Do `work` in a child; return its process id."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    return child


def killed(trainer: Any, out: Path, events: int | None, delay: float) -> tuple[bool, int]:
    """Train and kill; return whether it was killed in time, and the last step that was reported."""
    reader, writer = os.pipe()

    def train() -> None:
        trainer.args.output_dir = str(out)
        trainer.add_callback(Report(writer, events))
        trainer.train()

    child = fork(train)
    os.close(writer)
    steps = os.read(reader, KEPT)
    if events is None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    while more := os.read(reader, STEPS):
        steps += more
    os.close(reader)
    return os.WIFSIGNALED(status), max(steps, default=0)


def check(trainer: Any, out: Path, reported: int) -> int:
    """Check that the last good state is there and that a run goes on from it; return its step."""
    found = int(Path(find_checkpoint(out)).name.removeprefix("checkpoint-"))
    assert found >= reported, (found, reported)

    def go_on() -> None:
        trainer.args.output_dir, trainer.args.max_steps = str(out), found + 1
        trainer.train(resume_from_checkpoint=True)

    assert os.waitpid(fork(go_on), 0)[1] == 0, "cannot go on"
    assert hidden(out) == [], hidden(out)
    kept = sorted(path for path in out.iterdir() if path.name.startswith("checkpoint"))
    assert len(kept) == KEPT
    assert all(inspect_checkpoint(path, ()).complete for path in kept)
    return found


def main(folder: Path, count: int) -> None:
    """Print how many runs were killed, how many of them left something unfinished, and where."""
    torch.set_num_threads(1)
    chance = random.Random(0)
    trainer = run(folder / "none", max_steps=STEPS, save_total_limit=KEPT)
    gc.freeze()  # a collection in a child would copy every page
    struck, unfinished, steps = 0, 0, []
    for i in range(count):
        out = folder / str(i)
        events = chance.randrange(400) if i % 2 == 0 else None
        was, reported = killed(trainer, out, events, chance.uniform(0.0, 0.4))
        struck += was
        unfinished += bool(hidden(out))
        steps.append(check(trainer, out, reported))
    print(json.dumps({"killed": struck, "unfinished": unfinished, "steps": steps}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
