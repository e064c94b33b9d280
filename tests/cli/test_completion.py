"""Shell completion: verbs, recipe names, objectives, kinds; without torch."""

import os
import subprocess
import sys

import pytest

from moeadapt.catalogue import KINDS
from moeadapt.cli.methods import KINDS as KNOWN

PROBE = (
    "import sys\n"
    "from moeadapt.cli import main\n"
    "try:\n    main()\nexcept SystemExit:\n    pass\n"
    "print(sorted({'torch', 'peft', 'transformers', 'trl'} & set(sys.modules)), file=sys.stderr)\n"
)


def completed(shell, typed):
    """Return what the shell would be offered after `typed`."""
    words = {
        "bash": {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split(" ")) - 1)},
        "zsh": {"_TYPER_COMPLETE_ARGS": typed},
        "fish": {"_TYPER_COMPLETE_ARGS": typed, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]
    env = {**os.environ, **words, "_MOEADAPT_COMPLETE": f"complete_{shell}"}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, env=env, timeout=60
    )
    assert done.stderr.strip() == "[]"
    return done.stdout


@pytest.mark.parametrize(
    ("shell", "typed", "offered"),
    [
        ("bash", "moeadapt re", ["report", "recipes"]),
        ("bash", "moeadapt train ", ["sft", "dpo", "kto", "grpo", "rloo", "reward"]),
        ("bash", "moeadapt recipes cp sft/smollm2_mi", ["sft/smollm2_mixlora"]),
        ("bash", "moeadapt methods ", ["router", "balance", "experts", "preset"]),
        ("bash", "moeadapt chat --temp", ["--temperature"]),
    ],
)
def test_bash_is_offered_what_begins_like_what_was_typed(shell, typed, offered):
    assert sorted(completed(shell, typed).split()) == sorted(offered)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_offered_the_same(shell):
    assert "sft/smollm2_mixlora" in completed(shell, "moeadapt recipes cp sft/smollm2_mi")


def test_the_kinds_that_are_offered_are_those_of_the_catalogue():
    assert sorted(KINDS) == list(KNOWN)
