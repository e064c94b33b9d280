"""`moeadapt push`: options, exit codes, JSON, and a transcript that is the one in the docs."""

import json
import os
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from moeadapt.errors import AssetError
from tests.faults.cli import MAIN, call
from tests.faults.loading_kit import edit_settings
from tests.hub.kit import BASE, CARD, add_base, connected, copied, files_of, pushed, shelf
from tests.hub.loopback import TOKEN, Loopback
from tests.hub.transcript import OUT, ROOT

GIVEN = ["--base-model", BASE, "--license", "apache-2.0"]


def test_a_dry_run_prints_card_and_files():
    answer = call("push", str(shelf() / "adapter"), "ann/math", *GIVEN, "--dry-run")
    assert answer.code == 0, answer.err
    assert "pip install moeadapt" in answer.out
    assert "adapter_model.safetensors" in answer.out
    assert "dry run: nothing was sent" in answer.out
    answer = call("push", str(shelf() / "adapter"), "ann/math", *GIVEN, "--dry-run", "--json")
    found = json.loads(answer.out)
    assert found["commit"] is None
    assert CARD in found["files"]


def test_wrong_input_exits_with_2_and_a_hub_that_fails_with_1(tmp_path):
    adapter = str(shelf() / "adapter")
    for arguments, message in (
        ((adapter, "math", *GIVEN, "--dry-run"), "must be 'owner/name'"),
        ((adapter, "ann/math", "--license", "mit", "--dry-run"), "--base-model owner/name"),
        ((adapter, "ann/math", "--base-model", BASE, "--dry-run"), "the licence is unknown"),
        ((adapter, "ann/math", *GIVEN, "--data", "x.jsonl"), "belongs to --with-static-lora"),
        ((str(tmp_path), "ann/math", *GIVEN, "--dry-run"), "holds neither"),
    ):
        answer = call("push", *arguments)
        assert answer.code == 2, answer
        assert message in answer.err
        assert "Traceback" not in answer.err
    answer = call("push", adapter, "ann/math", *GIVEN, "--token", TOKEN)  # the process is offline
    assert answer.code == 1
    assert "HF_HUB_OFFLINE is set" in answer.err
    assert TOKEN not in answer.err + answer.out


def test_a_push_from_a_terminal_lands_on_the_hub_without_the_token_anywhere(tmp_path):
    folder = copied(tmp_path)
    with Loopback() as hub:
        env = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HF_HOME": str(tmp_path / "cache"),
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_DEBUG": "1",
        }
        env.pop("HF_TOKEN", None)
        command = ["push", str(folder), "ann/math", *GIVEN, "--private", "--token", TOKEN]
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", MAIN, *command],
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert f"pushed: {hub.url}/ann/math/commit/" in done.stdout
        assert hub.repositories["ann/math"].private
        assert CARD in files_of(hub)
    assert TOKEN not in done.stdout
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()


def test_a_pipe_gets_no_bars_and_lines_that_are_not_folded(tmp_path):
    folder = copied(tmp_path)
    (folder / ("x" * 90 + ".txt")).write_text("mine")
    for more in ([], ["--json"]):
        arguments = ["push", str(folder), "ann/math", *GIVEN, "--with-static-lora", "--dry-run"]
        answer = call(*arguments, *more)
        assert answer.code == 0, answer.err
        assert "%|" not in answer.err + answer.out
        assert more or f"stays here: {'x' * 90}.txt (not part of what is published)\n" in answer.out


def test_a_dry_run_takes_the_base_from_this_machine_or_says_that_it_is_not_there(tmp_path):
    folder = edit_settings(copied(tmp_path), base_model_name_or_path="ann/nowhere")
    with connected(tmp_path / "home", token=TOKEN) as hub:
        with pytest.raises(AssetError, match="uses no network.*hf download ann/nowhere"):
            pushed(folder, base_model=None, with_static_lora=True, dry_run=True)
        assert hub.log == []
        add_base(hub)
        AutoModelForCausalLM.from_pretrained(BASE)  # and now it is in the cache
        AutoTokenizer.from_pretrained(BASE)
        edit_settings(folder, base_model_name_or_path=BASE)
        hub.heal()
        result = pushed(folder, base_model=None, with_static_lora=True, dry_run=True)
        assert "static-lora/adapter_model.safetensors" in result.files
        assert hub.log == []


def test_a_dry_run_does_not_build_a_base_that_is_built_in(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEADAPT_CACHE", str(tmp_path / "cache"))
    folder = edit_settings(copied(tmp_path), base_model_name_or_path="embedded:smollm2-135m")
    with pytest.raises(AssetError, match="uses no network.*use embedded:smollm2-135m once"):
        pushed(folder, with_static_lora=True, dry_run=True)
    assert not (tmp_path / "cache").exists()


def test_help_shows_examples_and_imports_no_torch():
    probe = (
        "import sys\nfrom moeadapt.cli import main\nsys.argv = ['moeadapt', 'push', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print('HEAVY', sorted({'torch', 'peft', 'huggingface_hub'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.stdout.rstrip().endswith("HEAVY []")
    assert "moeadapt push outputs/math ann/math --license apache-2.0" in done.stdout


def test_the_transcript_in_the_docs_shows_every_step():
    text = OUT.read_text(encoding="utf-8")
    for line in (
        "$ moeadapt push sums ann/sums\n",
        "--base-model owner/name",
        "the licence is unknown",
        "pushed: http://127.0.0.1:PORT/ann/sums/commit/",
        "PeftModelForCausalLM",
        "KeyError: 'MOEADAPT'",
    ):
        assert line in text
    assert TOKEN not in text
