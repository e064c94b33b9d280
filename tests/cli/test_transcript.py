"""The transcript of docs/cli.md is what happens: each command is run and its output compared."""

import doctest
import os
import re
import shlex
from pathlib import Path

import pytest

from tests.cli.calls import call, verbs
from tests.cli.world import make_world

PAGE = (Path(__file__).parents[2] / "docs/cli.md").read_text(encoding="utf-8")

NOT_RUN = {"demo"}
"""Takes minutes."""

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def blocks(language):
    """Return what stands after each opening fence of `language`: its title, and its text."""
    pattern = rf'^```{language}(?: title="(.*?)")?\n(.*?)^```$'
    return re.findall(pattern, PAGE, re.MULTILINE | re.DOTALL)


def steps():
    """Return each command of the page and the output below it."""
    found = []
    for _, text in blocks("console"):
        first, *parts = re.split(r"^\$ (.*)\n", text, flags=re.MULTILINE)
        assert first == ""
        found += list(zip(parts[::2], parts[1::2], strict=True))
    return found


STEPS = steps()


def run(command):
    """Run a line of the page: `moeadapt ...`, or `printf 'TEXT' | moeadapt ...`."""
    given, _, line = command.rpartition(" | ")
    said = None
    if given:
        (printf, text) = shlex.split(given)
        assert printf == "printf"
        said = text.replace("\\n", "\n")
    program, *args = shlex.split(line)
    assert program == "moeadapt"
    return call(*args, input=said)


def plain(text):
    """Return text without the widths of tables, which are those of the numbers in them."""
    return re.sub(r" *([│┃]) *", r"\1", re.sub("[━─]+", "━", text))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("world"))
    for title, text in blocks("yaml"):
        (folder / title).write_text(text)
    before, columns = os.getcwd(), os.environ.get("COLUMNS")
    os.chdir(folder)
    os.environ["COLUMNS"] = "88"
    yield folder
    os.chdir(before)
    os.environ.pop("COLUMNS")
    if columns is not None:
        os.environ["COLUMNS"] = columns


@pytest.mark.parametrize(
    "number", range(len(STEPS)), ids=[f"{i:02} {command}" for i, (command, _) in enumerate(STEPS)]
)
def test_a_command_of_the_page_says_what_stands_below_it(number, world):
    command, wanted = STEPS[number]
    done = run(command)
    checker = doctest.OutputChecker()
    if not checker.check_output(plain(wanted), plain(done.output), FLAGS):
        example = doctest.Example(command, plain(wanted))
        pytest.fail(checker.output_difference(example, plain(done.output), FLAGS))
    assert done.exit_code == (2 if wanted.startswith("error:") else 0)


def test_the_page_runs_every_verb():
    lines = [command.rpartition(" | ")[2] for command, _ in STEPS]
    missing = {verb for verb in verbs() if not any(x.startswith(f"moeadapt {verb}") for x in lines)}
    assert missing <= NOT_RUN


def test_a_wrong_output_is_noticed():
    checker = doctest.OutputChecker()
    wanted = plain(next(out for command, out in STEPS if command.startswith("moeadapt plan")))
    assert not checker.check_output(wanted, wanted.replace("25,248", "25,249"), FLAGS)
