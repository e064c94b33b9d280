"""How long starting takes: wall seconds of fresh processes, in turns."""

import subprocess
import sys
import time

from benchmarks.speed.measure import Measured

COMMANDS = {
    "import peft": ["-c", "import peft"],
    "import moeadapt": ["-c", "import moeadapt"],
    "moeadapt --help": ["-c", "from moeadapt.cli import main; main()", "--help"],
}


def wall_seconds(arguments: list[str]) -> float:
    """Return the seconds of one process of this interpreter.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    begin = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - begin


def measure(rounds: int) -> list[Measured]:
    """Time every command; the first turn, which fills the file cache, does not count."""
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(rounds + 1):
        for name, arguments in COMMANDS.items():
            seconds = wall_seconds(arguments)
            if turn:
                taken[name].append(seconds)
    return [Measured("import", "wall", {}, taken, baseline="import peft")]
