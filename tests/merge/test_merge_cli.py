"""`moeadapt merge` and `moeadapt split` on an adapter folder."""

import json

import pytest

from moeadapt.cli.adapters import read_rows
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


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "not JSON"), ('{"prompt": "x"}', "a row has text"), ("", "has no rows")],
)
def test_a_damaged_row_is_named(tmp_path, line, message):
    (tmp_path / "rows.jsonl").write_text(line)
    with pytest.raises(ConfigError, match=message):
        read_rows(str(tmp_path / "rows.jsonl"))


def test_help_of_the_new_verbs_imports_no_torch():
    for verb in ("merge", "split"):
        assert run_cli(verb, "--help").returncode == 0
