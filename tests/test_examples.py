"""Every example runs as a user would run it, on a tiny model."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import saved_base
from tests.toy import toy_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, *args):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *map(str, args)],
        capture_output=True,
        text=True,
        cwd=EXAMPLES.parent,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = saved_base("llama", tmp_path_factory.mktemp("base"))
    toy_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("adapter")
    assert f"saved {out}" in run("01_fine_tune.py", base, out)
    return out


def test_a_saved_adapter_generates(adapter):
    printed = run("02_load_and_generate.py", adapter)
    assert "with experts:" in printed
    assert "base model:" in printed


def test_routing_can_be_looked_at(adapter):
    printed = run("03_look_at_routing.py", adapter)
    assert printed.count("experts per token 2.00") == 2


def test_a_loop_of_your_own_trains(base):
    printed = run("04_your_own_loop.py", base)
    assert printed.count("step ") == 4


def test_no_example_is_longer_than_80_lines():
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) < 80, path


def test_every_example_is_run_here():
    source = Path(__file__).read_text()
    assert all(path.name in source for path in EXAMPLES.glob("*.py"))
