"""Cases 110 and 111: any terminal will do, and the help is quick."""

import os
import subprocess
import sys

import pytest

from tests.faults.cli import MAIN, ROOT, spawn
from tests.tiny import saved_base

POOR = {
    "TERM": "dumb",
    "NO_COLOR": "1",
    "COLUMNS": "40",
    "LC_ALL": "C",
    "PYTHONUTF8": "0",
    "PYTHONCOERCECLOCALE": "0",
}
"""A terminal of 40 columns that knows ASCII alone."""

CALLS = {
    "help": (["--help"], 0, "train"),
    "help of a verb": (["train", "--help"], 0, "--dry-run"),
    "methods": (["methods"], 0, "top_k"),
    "unknown key": (["train", "sft", "--größe", "1"], 2, "unknown setting"),
    "no such file": (["train", "sft", "--config", "größe.yaml"], 2, "cannot read the recipe"),
    "plan": (["plan", "sft"], 0, "trainable"),
}

CALL_ALL = """
import os, sys
from moeadapt.cli import main
for args in {calls!a}:
    # As the system would hand them over.
    sys.argv = ["moeadapt", *(os.fsdecode(arg.encode()) for arg in args)]
    try:
        main()
    except SystemExit as end:
        for stream in (sys.stdout, sys.stderr):
            print("END", end.code or 0, file=stream, flush=True)
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    """Make every call in one process with a poor terminal; return code, stdout and stderr."""
    base = saved_base("llama", tmp_path_factory.mktemp("Größe"))
    flags = ["--model_name_or_path", base, "--output_dir", "unused", "--use_cpu", "true"]
    flags += ["--bf16", "false", "--moe.target_modules", "all-linear"]
    calls = [[*args, *(flags if args[0] == "plan" else [])] for args, _, _ in CALLS.values()]
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "OMP_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CALL_ALL.format(calls=calls)],
        cwd=ROOT,
        env={**kept, **POOR, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode()
    outs, errs = (stream.decode("ascii").split("END ") for stream in (done.stdout, done.stderr))
    codes = [int(text.split("\n", 1)[0]) for text in outs[1:]]
    for texts in (outs, errs):
        texts[1:] = [text.split("\n", 1)[1] for text in texts[1:]]
    return dict(zip(CALLS, zip(codes, outs[:-1], errs[:-1], strict=True), strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_fault_110_a_poor_terminal_gets_plain_ascii(
    name: str, said: dict[str, tuple[int, str, str]]
) -> None:
    _, code, word = CALLS[name]
    found, out, err = said[name]
    assert found == code, err
    assert word in out + err
    assert "Traceback" not in err
    assert "\x1b" not in out + err
    if name in ("help", "plan"):
        assert max(map(len, out.splitlines())) <= 40


@pytest.mark.parametrize("env", [{}, {"NO_COLOR": "1"}], ids=["no terminal", "no colour"])
def test_fault_110_without_a_terminal_nothing_is_coloured(env: dict[str, str]) -> None:
    found = spawn("methods", "router", TERM="xterm-256color", **env)
    assert found.code == 0
    assert "\x1b" not in found.out + found.err


def used_seconds(*args: str) -> tuple[float, str]:
    """Return the processor seconds of a call, and what it printed."""
    command = [sys.executable, "-c", MAIN, *args]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as stream:
        out = stream.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime, out


def test_fault_111_help_takes_under_a_second_of_the_processor() -> None:
    runs = [used_seconds("--help") for _ in range(3)]
    assert all("train" in out for _, out in runs)
    assert min(seconds for seconds, _ in runs) < 1.0


HEAVY = ("torch", "peft", "transformers", "trl", "datasets", "numpy", "accelerate")

PROBE = """
import sys
sys.argv = ["moeadapt", *{args!r}]
from moeadapt.cli import main
try:
    main()
except SystemExit:
    pass
print("HEAVY", sorted(set({heavy!r}) & set(sys.modules)))
"""


@pytest.mark.parametrize("args", [["--help"], ["train", "--help"], ["--version"]])
def test_fault_111_help_imports_neither_torch_nor_peft(args: list[str]) -> None:
    probe = [sys.executable, "-c", PROBE.format(args=args, heavy=HEAVY)]
    done = subprocess.run(probe, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.rstrip().endswith("HEAVY []")
