"""`moeadapt merge` and `moeadapt split` on an adapter folder."""

import json
import re
import subprocess
import sys

import pytest

from moeadapt.cli.adapters import read_config, read_rows, to_batches
from moeadapt.errors import ConfigError
from tests.cli.test_cli_start import run_cli
from tests.tiny import adapt, moe_config, saved_base
from tests.toy import sentences, toy_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("cli")
    base = saved_base("llama", folder)
    toy_tokenizer().save_pretrained(base)
    model = adapt(AutoModelForCausalLM.from_pretrained(base), moe_config("ffn"))
    model.save_pretrained(str(folder / "adapter"))
    rows = [{"text": text, "domain": "ab"[i % 2]} for i, text in enumerate(sentences(20))]
    rows[0] = {"prompt": "w1 w2", "completion": "w3 w4", "domain": "a"}
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def call(*args):
    return run_cli(*(str(arg) for arg in args))


def test_merge_prints_residuals_and_losses_as_json(folder, tmp_path):
    out = tmp_path / "out"
    done = call(
        "merge", folder / "adapter", "--data", folder / "rows.jsonl", "--out", out, "--json"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert set(found["menu"]) == {"least_squares", "usage", "uniform", "single"}
    assert found["held_out"]
    assert set(found["losses"]["merged"]["by_domain"]) == {"a", "b"}
    assert 0 < found["mean_residual"] < 1
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"].endswith("llama-0")


def test_merge_prints_tables(folder, tmp_path):
    options = ["--method", "usage", "--data", folder / "rows.jsonl", "--out", tmp_path / "out"]
    done = call("merge", folder / "adapter", *options)
    assert done.returncode == 0, done.stderr
    for words in ("least_squares", "Loss per token on held-out rows", "exact", "wrote"):
        assert words in done.stdout


def test_merge_distills(folder, tmp_path):
    options = ["--method", "distill", "--steps", "2", "--data", folder / "plain.jsonl"]
    (folder / "plain.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in sentences(10)))
    done = call("merge", folder / "adapter", *options, "--out", tmp_path / "out", "--rank", "2")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 2
    assert re.search(
        r"divergence from the mixture: \d\.\d{4} nats per token, held-out", done.stdout
    )


def test_distilling_prints_json_alone(folder, tmp_path):
    options = ["--method", "distill", "--steps", "2", "--data", folder / "plain.jsonl", "--json"]
    (folder / "plain.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in sentences(10)))
    done = call("merge", folder / "adapter", *options, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["method"] == {"name": "distill"}
    assert "'loss'" in done.stderr


def test_settings_are_read_without_a_base(folder, tmp_path):
    assert read_config(str(folder / "adapter")).placement == "ffn"
    with pytest.raises(ConfigError, match="has no adapter_config"):
        read_config(str(tmp_path))


def test_split_writes_a_folder_per_expert(folder, tmp_path):
    done = call("split", folder / "adapter", "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert sorted(found) == ["expert_0", "expert_1", "expert_2", "expert_3", "shared"]
    assert all((tmp_path / "out" / name / "adapter_model.safetensors").is_file() for name in found)


WRONG = {
    "method": (["merge", "ADAPTER", "--out", "OUT", "--method", "ties"], "unknown merge method"),
    "folder": (["merge", "OUT", "--out", "OUT", "--method", "uniform"], "has no adapter_config"),
}


@pytest.mark.parametrize(("args", "message"), list(WRONG.values()), ids=list(WRONG))
def test_wrong_input_exits_with_2(folder, tmp_path, args, message):
    places = {"ADAPTER": folder / "adapter", "OUT": tmp_path / "out"}
    done = call(*(places.get(arg, arg) for arg in args))
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


ROWS = ["--data", "ROWS"]
UNUSED = {
    "expert of distill": ([*ROWS, "--method", "distill", "--expert", "0"], "--expert belongs to"),
    "expert of usage": ([*ROWS, "--method", "usage", "--expert", "0"], "--expert belongs to"),
    "steps": ([*ROWS, "--steps", "200"], "--steps belongs to --method distill"),
    "rate": (["--method", "svd", "--learning-rate", "2e-4"], "--learning-rate belongs to"),
    "length": (["--method", "uniform", "--max-length", "1024"], "--max-length cuts rows"),
    "no data": (["--method", "distill"], "needs --data"),
    "held out alone": (["--method", "usage", "--held-out", "ROWS"], "needs --data"),
    "method": ([*ROWS, "--method", "ties"], "unknown merge method 'ties'"),
}


EACH = """
import json, sys
from typer.testing import CliRunner
from moeadapt.cli import app
found = [CliRunner().invoke(app, args) for args in json.loads(sys.argv[1])]
print(json.dumps([[one.exit_code, one.stderr] for one in found]))
"""


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """What each of `UNUSED`, and an occupied place, is answered: in one process, which is fast."""
    folder = tmp_path_factory.mktemp("refused")
    new, full = str(folder / "new"), str(folder / "full")
    (folder / "full").mkdir()
    (folder / "full" / "mine").write_text("mine")
    asked = {name: ["merge", "none", "--out", new, *args] for name, (args, _) in UNUSED.items()}
    asked["occupied merge"] = ["merge", "none", "--out", full, "--method", "uniform"]
    asked["occupied split"] = ["split", "none", "--out", full]
    args = [sys.executable, "-W", "ignore", "-c", EACH, json.dumps(list(asked.values()))]
    done = subprocess.run(args, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in folder.iterdir()] == ["full"]
    return dict(zip(asked, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("name", list(UNUSED))
def test_an_option_without_effect_exits_with_2_before_anything_is_read(refused, name):
    code, message = refused[name]
    assert code == 2
    assert UNUSED[name][1] in message


@pytest.mark.parametrize("verb", ["merge", "split"])
def test_an_occupied_place_exits_with_2(refused, verb):
    code, message = refused[f"occupied {verb}"]
    assert code == 2
    assert "not an empty folder" in message


def test_held_out_rows_alone_are_measured(folder, tmp_path):
    options = ["--method", "uniform", "--held-out", folder / "rows.jsonl", "--max-length", "8"]
    done = call("merge", folder / "adapter", "--out", tmp_path / "out", "--json", *options)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert set(found["losses"]) == {"mixture", "merged", "base"}
    assert found["held_out"]


def test_rows_of_two_forms_are_not_distilled(folder, tmp_path):
    options = ["--method", "distill", "--data", folder / "rows.jsonl", "--out", tmp_path / "out"]
    done = call("merge", folder / "adapter", *options)
    assert done.returncode == 2
    assert "rows of one form" in done.stderr
    assert not (tmp_path / "out").exists()


GOOD = '{"text": "x"}'
DAMAGED = {
    "not JSON": ("{", "not JSON"),
    "columns": ('{"prompt": "x"}', "a row has text"),
    "list": ("[1]", "a row has text"),
    "number": ('{"text": 5}', "text is a int, not a string"),
    "conversation": (
        '{"prompt": [{"role": "user", "content": "x"}], "completion": "y"}',
        "prompt is a list, not a string; conversations go into messages",
    ),
    "domain": ('{"text": "x", "domain": 1}', "domain is a int"),
    "messages": ('{"messages": "hi"}', "messages is a list"),
    "no messages": ('{"messages": []}', "messages is a list"),
    "role": ('{"messages": [{"content": "hi"}]}', "messages is a list"),
    "content": ('{"messages": [{"role": "user", "content": 5}]}', "messages is a list"),
}


@pytest.mark.parametrize(("line", "message"), list(DAMAGED.values()), ids=list(DAMAGED))
def test_a_damaged_row_is_named_with_its_line(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(ConfigError, match=rf"rows\.jsonl:3: {re.escape(message)}"):
        read_rows(str(path))


def test_a_file_that_is_not_utf8_is_named_with_its_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD.encode() + b'\n{"text": "\xe9"}')
    with pytest.raises(ConfigError, match=r"rows\.jsonl:2: byte 11 is not UTF-8"):
        read_rows(str(path))


def test_a_file_without_rows_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text(" \n\n")
    with pytest.raises(ConfigError, match="has no rows"):
        read_rows(str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_only_line_ends_end_a_row(tmp_path, end):
    rows = [{"text": f"a{sign}b"} for sign in ("\u2028", "\u2029", "\x85")]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "rows.jsonl").write_bytes(end.join(lines).encode())
    assert read_rows(str(tmp_path / "rows.jsonl")) == rows


def test_messages_without_a_chat_template_are_refused():
    tokenizer = toy_tokenizer()
    rows = [{"messages": [{"role": "user", "content": "w1"}]}]
    assert to_batches(rows, tokenizer, max_length=8)
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        to_batches(rows, tokenizer, max_length=8)


PROBE = """
import sys
from moeadapt.cli import main
try:
    main()
except SystemExit as done:
    assert not done.code
heavy = {"torch", "peft", "transformers", "trl", "datasets"} & set(sys.modules)
print("HEAVY", sorted(heavy))
"""


@pytest.mark.parametrize("verb", ["merge", "split"])
def test_help_of_the_verbs_imports_neither_torch_nor_peft(verb):
    args = [sys.executable, "-c", PROBE, verb, "--help"]
    done = subprocess.run(args, capture_output=True, text=True)
    assert done.stdout.rstrip().endswith("HEAVY []"), done.stderr
