"""`moeadapt eval` on saved adapters: a mixture, a plain LoRA, the base alone."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from moeadapt.cli import app
from moeadapt.evaluation import evaluate
from tests.cli.test_cli_start import run_cli
from tests.evaluation.kit import TOKENIZER, rows
from tests.tiny import adapt, moe_config, saved_base, tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    base = saved_base("llama", folder)
    TOKENIZER.save_pretrained(base)
    model = adapt(AutoModelForCausalLM.from_pretrained(base), moe_config("block"))
    model.save_pretrained(str(folder / "mixture"))
    config = LoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", r=2, init_lora_weights=False
    )
    torch.manual_seed(0)
    plain = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    plain.save_pretrained(str(folder / "lora"))
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows())))
    texts = [{"text": row["text"]} for row in rows() if "text" in row]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    return folder


def call(folder, *args):
    """Run the verb in this process, where an import is paid once."""
    places = {"ROWS": folder / "rows.jsonl", "TEXTS": folder / "texts.jsonl"}
    places |= {"MIXTURE": folder / "mixture", "LORA": folder / "lora"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = [str(places.get(arg, arg)) for arg in args]
        return CliRunner().invoke(app, ["eval", *given, "--device", "cpu"])


@pytest.fixture(scope="module")
def both(folder):
    """The mixture and the plain LoRA, everything measured."""
    out = folder / "results.json"
    options = ["--data", "ROWS", "--against", "LORA", "--forgetting", "TEXTS", "--generate"]
    done = call(folder, "MIXTURE", *options, "--json", "--out", out)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert json.loads(out.read_text()) == found
    return found


def test_both_arms_are_measured_and_compared(both):
    mine, theirs = both["data"]["overall"]["nll"], both["other"]["data"]["overall"]["nll"]
    assert mine != theirs
    assert both["comparison"]["nll"]["value"] == pytest.approx(mine - theirs)
    assert set(both["comparison"]["nll_by_domain"]) == {"a", "b"}
    assert both["comparison"]["exact"]["value"] == 0.0
    assert both["data"]["overall"]["answered"] == 8


def test_the_loss_is_that_of_evaluate(both):
    model = adapt(tiny("llama"), moe_config("block"))
    found = evaluate(model, TOKENIZER, rows()).overall.nll
    assert both["data"]["overall"]["nll"] == pytest.approx(found, rel=1e-4)


def test_what_each_adapter_forgets_is_told(both):
    off = [arm["forgetting"]["off"]["overall"]["nll"] for arm in (both, both["other"])]
    assert off[0] == pytest.approx(off[1])
    for arm in (both, both["other"]):
        assert arm["forgetting"]["change"]["nll"]["value"] != 0


def test_a_plain_lora_is_compared_with_the_base_in_tables(folder):
    args = ["LORA", "--data", "ROWS", "--against", "base", "--forgetting", "TEXTS", "--generate"]
    done = call(folder, *args, "--max-length", "32")
    assert done.exit_code == 0, done.output
    for words in (
        "Held-out loss, nats per token: adapter",
        "Held-out loss, nats per token: base",
        "adapter minus base, row by row",
        "Loss on the base's own text",
        "exact",
    ):
        assert words in done.stdout
    assert "Loss on the base's own text, nats per token: base" not in done.stdout


def test_rows_that_were_cut_are_mentioned(folder):
    done = call(folder, "LORA", "--forgetting", "TEXTS", "--data", "TEXTS", "--max-length", "5")
    assert done.exit_code == 0, done.output
    assert "rows were cut at 5 tokens" in done.stdout


WRONG = {
    "nothing": (["MIXTURE"], "nothing to measure; give --data, --forgetting or --tasks"),
    "generate": (
        ["MIXTURE", "--forgetting", "TEXTS", "--generate"],
        "--generate belongs to --data",
    ),
    "new tokens": (["MIXTURE", "--data", "ROWS", "--max-new-tokens", "4"], "belongs to --generate"),
    "limit": (["MIXTURE", "--data", "ROWS", "--limit", "4"], "--limit belongs to --tasks"),
    "shots": (["MIXTURE", "--data", "ROWS", "--num-fewshot", "4"], "--num-fewshot belongs to"),
    "out": (["MIXTURE", "--data", "ROWS", "--out", "ROWS"], "exists; give a new file"),
    "no folder": (
        ["MIXTURE", "--data", "ROWS", "--out", "none/results.json"],
        "there is no folder",
    ),
    "no file": (["MIXTURE", "--data", "none.jsonl"], "cannot read none.jsonl"),
    "adapter": (["none", "--data", "ROWS"], "none has no adapter_config.json"),
    "other arm": (["MIXTURE", "--data", "ROWS", "--against", "none"], "none has no adapter_config"),
    "dtype": (["MIXTURE", "--data", "ROWS", "--dtype", "int8"], "--dtype 'int8': one of"),
    "texts": (["MIXTURE", "--forgetting", "ROWS"], "row 1 of the base's own text has no text"),
}


@pytest.mark.parametrize(("args", "message"), list(WRONG.values()), ids=list(WRONG))
def test_wrong_input_exits_with_2(folder, args, message):
    done = call(folder, *args)
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.stderr.split())
    assert done.stdout == ""


def test_a_wrong_device_exits_with_2(folder):
    places = [str(folder / "lora"), "--data", str(folder / "rows.jsonl"), "--device", "tpu9"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = CliRunner().invoke(app, ["eval", *places])
    assert done.exit_code == 2
    assert "--device tpu9" in done.stderr


def test_an_adapter_of_another_method_exits_with_2(folder, tmp_path):
    settings = json.loads((folder / "lora" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "peft_type": "IA3"}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    done = call(folder, tmp_path, "--data", "ROWS")
    assert done.exit_code == 2
    assert "is no moeadapt or LoRA adapter: peft_type is 'IA3'" in done.stderr


def test_in_a_process_of_its_own_stdout_is_json_alone(folder):
    done = run_cli("eval", str(folder / "lora"), "--data", str(folder / "texts.jsonl"), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["data"]["overall"]["rows"] == 4
