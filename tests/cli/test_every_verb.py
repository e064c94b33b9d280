"""What holds for every verb: help with examples, JSON that parses, mistakes in one message."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.cli.calls import call, verbs
from tests.cli.world import ADAPTER, BASE, HELD_OUT, RECIPE, TRAIN, make_world

VERBS = sorted(verbs())

ELSEWHERE = {"demo"}
"""Takes minutes: run by its own tests."""

JSON = {
    "chat": ["chat", ADAPTER, "--max-new-tokens", "2"],
    "doctor": ["doctor", ADAPTER],
    "eval": ["eval", ADAPTER, "--data", HELD_OUT, "--against", "base"],
    "export": ["export", ADAPTER, "--out", "stock"],
    "merge": ["merge", ADAPTER, "--out", "merged", "--data", TRAIN],
    "methods": ["methods", "router"],
    "plan": ["plan", "sft", "--config", "tiny.yaml"],
    "push": [
        *("push", ADAPTER, "me/mine", "--license", "mit", "--base-model", "me/it"),
        "--dry-run",
    ],
    "recipes cp": ["recipes", "cp", "dpo/smollm2_mixlora", "copied.yaml"],
    "recipes ls": ["recipes", "ls"],
    "report": ["report", ADAPTER, "--data", HELD_OUT, "--max-texts", "2"],
    "split": ["split", ADAPTER, "--out", "experts"],
    "train": ["train", "sft", "--config", "tiny.yaml", "--output_dir", "again"],
    "upcycle": ["upcycle", BASE, "--out", "moe", "--num-experts", "2"],
    "validate": ["validate", "sft", "--config", "tiny.yaml"],
}

WRONG = {
    "chat": (["chat", "./nowhere"], "there is no folder ./nowhere"),
    "demo": (["demo", "--steps", "-1"], "'--steps'"),
    "doctor": (["doctor", "nowhere"], "nowhere is no folder"),
    "eval": (["eval", ADAPTER], "give --data, --forgetting or --tasks"),
    "export": (["export", "nowhere", "--out", "x"], "has no adapter_config.json"),
    "merge": (["merge", ADAPTER, "--out", "x"], "--method uniform"),
    "methods": (["methods", "routr"], "did you mean 'router'?"),
    "plan": (["plan", "sft", "--config", "tiny.yaml", "--moe.ranks", "2"], "ranks"),
    "push": (["push", BASE, "me/mine", "--dry-run"], "adapter"),
    "recipes cp": (["recipes", "cp", "sft/smolm2_soft"], "did you mean 'sft/smollm2_soft'?"),
    "recipes ls": (["recipes", "ls", "dop"], "did you mean 'dpo'?"),
    "report": (["report", ADAPTER, "--data", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
    "split": (["split", ADAPTER, "--out", BASE], "is not an empty folder"),
    "train": (["train", "sft", "--config", "sft/smollm2_soft"], "recipes cp sft/smollm2_soft"),
    "upcycle": (["upcycle", BASE, "--out", "x"], "give --num-experts"),
    "validate": (["validate", "stf"], "did you mean 'sft'?"),
}

PROBE = """
import contextlib, io, json, sys, time
from moeadapt.cli import main
found = {}
for verb in json.loads(sys.argv[1]):
    sys.argv, said = ["moeadapt", *verb.split(), "--help"], io.StringIO()
    start = time.perf_counter()
    with contextlib.redirect_stdout(said):
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
    heavy = sorted({"torch", "peft", "transformers", "trl", "datasets"} & set(sys.modules))
    found[verb] = [code, said.getvalue(), time.perf_counter() - start, heavy]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def helps():
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(VERBS)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "100", "TERM": "dumb"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("world"))
    (folder / "tiny.yaml").write_text(RECIPE)
    before = os.getcwd()
    os.chdir(folder)
    done = call("train", "sft", "--config", "tiny.yaml", "--output_dir", ADAPTER)
    assert done.exit_code == 0, done.output
    yield folder
    os.chdir(before)


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_examples_that_call_it_and_is_fast_and_light(verb, helps):
    code, text, seconds, heavy = helps[verb]
    assert code == 0
    examples = text.partition("Examples")[2]
    assert re.search(rf"^ *\$ moeadapt {verb}\b", examples, re.MULTILINE), text
    assert seconds < 2.0
    assert heavy == []
    assert "\x1b" not in text


def test_the_main_help_tells_the_exit_codes():
    said = call("--help").output
    for code in ("0 done", "1 failed", "2 the input is wrong", "130 interrupted", "143 terminated"):
        assert code in re.sub(r"\s+", " ", said)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_in_the_tables_of_this_file(verb):
    assert verb in JSON or verb in ELSEWHERE
    assert verb in WRONG or verb in ELSEWHERE


@pytest.mark.parametrize("verb", sorted(JSON))
def test_json_parses_and_nothing_stands_beside_it(verb, world):
    done = call(*JSON[verb], "--json", input="w1 w2\n" if verb == "chat" else None)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)
    assert "\x1b" not in done.output


@pytest.mark.parametrize("verb", sorted(WRONG))
def test_wrong_input_exits_with_2_and_says_what_to_do(verb, world):
    args, message = WRONG[verb]
    before = sorted(path for path in world.rglob("*") if "runs" not in path.parts)
    done = call(*args)
    assert done.exit_code == 2, done.output
    assert message in re.sub(r"\s+", " ", done.stderr)
    assert isinstance(done.exception, SystemExit)
    assert "Traceback" not in done.output
    assert done.stdout == ""
    assert sorted(path for path in world.rglob("*") if "runs" not in path.parts) == before
