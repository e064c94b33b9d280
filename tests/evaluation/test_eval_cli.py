"""`moeadapt eval` on saved adapters: a mixture, a plain LoRA, the base alone."""

import json
import subprocess
import sys
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from moeadapt.cli import evaluate as verb
from moeadapt.cli.evaluate_tables import print_tables
from moeadapt.evaluation import evaluate
from moeadapt.evaluation.harness import TaskResults, TaskScore
from tests.evaluation.kit import TOKENIZER, rows
from tests.tiny import adapt, moe_config, saved_base, tiny

MEASURED = {
    "both": [
        "MIXTURE", "--data", "ROWS", "--against", "LORA", "--forgetting", "TEXTS", "--generate",
        "--json", "--out", "RESULTS",
    ],
    "base": [
        "LORA", "--data", "ROWS", "--against", "base", "--forgetting", "TEXTS", "--generate",
        "--max-new-tokens", "32", "--max-length", "32",
    ],
    "cut": ["LORA", "--forgetting", "TEXTS", "--data", "TEXTS", "--max-length", "5"],
}  # fmt: skip

WRONG = {
    "nothing": (["MIXTURE"], "nothing to measure; give --data, --forgetting or --tasks"),
    "no task": (["MIXTURE", "--tasks", ","], "nothing to measure"),
    "base alone": (["LORA", "--forgetting", "TEXTS", "--against", "base"], "leave --against out"),
    "generate": (["MIXTURE", "--forgetting", "TEXTS", "--generate"], "--generate belongs to --dat"),
    "new tokens": (["MIXTURE", "--data", "ROWS", "--max-new-tokens", "4"], "belongs to --generate"),
    "limit": (["MIXTURE", "--data", "ROWS", "--limit", "4"], "--limit belongs to --tasks"),
    "shots": (["MIXTURE", "--data", "ROWS", "--num-fewshot", "4"], "--num-fewshot belongs to"),
    "out": (["MIXTURE", "--data", "ROWS", "--out", "ROWS"], "exists; give a new file"),
    "no folder": (["MIXTURE", "--data", "ROWS", "--out", "none/a.json"], "there is no folder"),
    "no file": (["MIXTURE", "--data", "none.jsonl"], "cannot read none.jsonl"),
    "adapter": (["none", "--data", "ROWS"], "none has no adapter_config.json"),
    "other arm": (["MIXTURE", "--data", "ROWS", "--against", "none"], "none has no adapter_config"),
    "method": (["IA3", "--data", "ROWS"], "is no moeadapt or LoRA adapter: peft_type is 'IA3'"),
    "dtype": (["MIXTURE", "--data", "ROWS", "--dtype", "int8"], "--dtype 'int8': one of"),
    "device": (["LORA", "--data", "ROWS", "--device", "tpu9"], "--device tpu9"),
    "texts": (["MIXTURE", "--forgetting", "ROWS"], "row 1 of the base's own text has no text"),
}

EACH = """
import json, sys
from typer.testing import CliRunner
from moeadapt.cli import app
found = [CliRunner().invoke(app, ["eval", *args]) for args in json.loads(sys.argv[1])]
print(json.dumps([[one.exit_code, one.stdout, one.stderr] for one in found]))
"""


def lora(base):
    config = LoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", r=2, init_lora_weights=False
    )
    torch.manual_seed(0)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    base = saved_base("llama", folder)
    TOKENIZER.save_pretrained(base)
    model = adapt(AutoModelForCausalLM.from_pretrained(base), moe_config("block"))
    model.save_pretrained(str(folder / "mixture"))
    lora(base).save_pretrained(str(folder / "lora"))
    settings = json.loads((folder / "lora" / "adapter_config.json").read_text())
    (folder / "ia3").mkdir()
    (folder / "ia3" / "adapter_config.json").write_text(
        json.dumps({**settings, "peft_type": "IA3"})
    )
    (folder / "ia3" / "adapter_model.safetensors").write_bytes(b"")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows())))
    texts = [{"text": row["text"]} for row in rows() if "text" in row]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    return folder


@pytest.fixture(scope="module")
def answers(folder):
    """Exit code, stdout and stderr of every call, made in one process, which is fast."""
    places = {"ROWS": "rows.jsonl", "TEXTS": "texts.jsonl", "RESULTS": "results.json"}
    places |= {name: name.lower() for name in ("MIXTURE", "LORA", "IA3")}
    asked = {**MEASURED, **{name: args for name, (args, _) in WRONG.items()}}
    calls = [
        [str(folder / places[a]) if a in places else a for a in args] for args in asked.values()
    ]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EACH, json.dumps(calls)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(asked, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.fixture(scope="module")
def both(answers):
    """The mixture and the plain LoRA, everything measured."""
    code, out, err = answers["both"]
    assert code == 0, err
    return json.loads(out)


def test_the_file_holds_what_is_printed(both, folder):
    assert json.loads((folder / "results.json").read_text()) == both


def test_both_arms_are_measured_and_compared(both):
    mine, theirs = both["data"]["overall"]["nll"], both["other"]["data"]["overall"]["nll"]
    assert mine != theirs
    assert both["comparison"]["nll"]["value"] == pytest.approx(mine - theirs)
    assert set(both["comparison"]["nll_by_domain"]) == {"a", "b"}
    assert both["comparison"]["exact"]["value"] == 0.0
    assert both["data"]["overall"]["answered"] == 8


def test_the_losses_are_those_of_evaluate(both, folder):
    mixture = adapt(tiny("llama"), moe_config("block"))
    for arm, model in ((both, mixture), (both["other"], lora(saved_base("llama", folder)))):
        found = evaluate(model, TOKENIZER, rows()).overall.nll
        assert arm["data"]["overall"]["nll"] == pytest.approx(found, rel=1e-4)


def test_what_each_adapter_forgets_is_told(both):
    off = [arm["forgetting"]["off"]["overall"]["nll"] for arm in (both, both["other"])]
    assert off[0] == pytest.approx(off[1])
    for arm in (both, both["other"]):
        assert arm["forgetting"]["change"]["nll"]["value"] != 0


def test_a_plain_lora_is_compared_with_the_base_in_tables(answers):
    code, out, err = answers["base"]
    assert code == 0, err
    for words in (
        "Held-out loss, nats per token: adapter",
        "Held-out loss, nats per token: base",
        "adapter minus base, row by row",
        "Loss on the base's own text, nats per token:",
        "exact",
    ):
        assert words in out
    assert out.count("Loss on the base's own text") == 1


def test_rows_that_were_cut_are_mentioned(answers):
    code, out, err = answers["cut"]
    assert code == 0, err
    assert "rows were cut at 5 tokens" in out


@pytest.mark.parametrize("name", list(WRONG))
def test_wrong_input_exits_with_2_and_says_why(answers, name):
    code, out, err = answers[name]
    assert code == 2, err
    assert WRONG[name][1] in " ".join(err.split())
    assert out == ""
    assert "Traceback" not in err


JOB = {
    "data": None, "forgetting": None, "tasks": ["toy"], "limit": 4, "num_fewshot": 2,
    "include_path": "here", "generate": False, "max_new_tokens": None, "batch_size": 2, "seed": 3,
}  # fmt: skip


def test_tasks_are_run_on_each_arm_with_what_was_asked_for(model, monkeypatch, capsys):
    asked = []

    def run(model, tokenizer, tasks, **options):
        asked.append((tasks, options))
        score = TaskScore(values={"acc,none": 0.5}, errors={"acc,none": 0.1}, rows=4, version="1")
        return TaskResults(tasks={"toy": score}, limit=4, num_fewshot=2, harness="0", seed=3)

    monkeypatch.setattr("moeadapt.evaluation.run_tasks", run)
    job = verb._Job(**JOB, max_length=16)
    found, evaluation = verb._measure(job, model, TOKENIZER)
    other, _ = verb._measure(job, model, TOKENIZER, off=True)
    assert evaluation is None
    options = {"limit": 4, "num_fewshot": 2, "include_path": "here", "batch_size": 2}
    assert asked == [(["toy"], {**options, "max_length": 16, "seed": 3})] * 2
    verb._measure(verb._Job(**JOB, max_length=None), model, TOKENIZER)
    assert "max_length" not in asked[-1][1], "prompts of tasks would be cut unasked"
    print_tables({**found, "against": "base", "other": other})
    printed = capsys.readouterr().out
    assert printed.count("0.5000 ± 0.1000") == 2
    assert "base" in printed


def test_the_first_model_is_gone_before_the_second_is_loaded(monkeypatch):
    loaded = []

    def load(folder, *place):
        assert all(one() is None for one in loaded), "two bases may not fit"
        ring = torch.nn.Identity()
        ring.module_of_itself = [ring]
        loaded.append(weakref.ref(ring))
        return ring, TOKENIZER

    monkeypatch.setattr(verb, "_known", lambda folder: None)
    monkeypatch.setattr(verb, "_load", load)
    monkeypatch.setattr(verb, "_measure", lambda job, model, tokenizer: ({}, None))
    verb._run(verb._Job(**JOB, max_length=None), "one", "two", (None, "auto", "cpu"))
    assert len(loaded) == 2
