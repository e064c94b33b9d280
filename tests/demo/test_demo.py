"""The demo's whole path on a tiny model, and its arithmetic."""

import json
import math
from pathlib import Path

import pytest
import torch

from moeadapt.demo import run as demo
from moeadapt.demo.arms import batch_of, make_arms
from moeadapt.demo.heldout import Mean, answer_nll, verdict
from moeadapt.demo.stock import make_room
from moeadapt.errors import ConfigError
from tests.tiny import saved_base, tiny
from tests.toy import toy_tokenizer

ROWS = [
    {"prompt": "w1 w2", "completion": "w3", "domain": "a"},
    {"prompt": "w4", "completion": "w5 w6 w7", "domain": "b"},
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    base = saved_base("llama", tmp_path_factory.mktemp("base"))
    toy_tokenizer().save_pretrained(base)
    out = tmp_path_factory.mktemp("demo")
    patch = pytest.MonkeyPatch()
    patch.setattr(demo, "resolve_model", lambda name, progress: str(base))
    patch.setattr(demo, "TEST_ROWS", 4)
    patch.setattr(demo, "MOST_STEPS", 3)
    demo.run_demo(str(out), steps=2, as_json=True)
    patch.undo()
    return json.loads((out / "results.json").read_text())


def test_every_arm_is_measured_on_every_task(results):
    names = [arm.name for arm in make_arms()]
    assert list(results["arms"]) == ["base model", *names]
    for entry in results["arms"].values():
        assert set(entry["nll"]) == set(demo.TASKS)
        assert all(math.isfinite(v["value"]) for v in entry["nll"].values())


def test_both_mixtures_load_in_a_new_process_with_equal_logits(results):
    gaps = [entry.get("reload_max_difference") for entry in results["arms"].values()]
    assert [gap for gap in gaps if gap is not None] == [0.0, 0.0]


def test_the_ffn_mixture_is_exported_and_the_receipt_kept(results):
    receipt = results["export"]
    assert (receipt["target"], receipt["num_experts"], receipt["top_k"]) == ("mixtral", 4, 2)
    assert receipt["measured"]["max_logit_difference"] <= receipt["tolerance"] == 1e-4


def test_only_a_checkpoint_of_an_earlier_demo_is_replaced(tmp_path):
    place = make_room(tmp_path)
    place.mkdir()
    (place / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match="exists"):
        make_room(tmp_path)
    (place / "export_receipt.json").write_text("{}")
    assert make_room(tmp_path) == place
    assert not place.exists()


def test_the_routing_report_of_the_better_mixture_is_written(results):
    mixtures = [arm.name for arm in make_arms() if arm.is_mixture]
    best = min(mixtures, key=lambda name: results["arms"][name]["mean"]["value"])
    page = Path(results["report"]["page"])
    assert best in page.read_text()
    assert page.stat().st_size == results["report"]["bytes"] < 2_000_000
    data = json.loads(page.with_suffix(".json").read_text())
    assert [point["step"] for point in data["training"]] == [1, 2]
    assert set(results["report"]["verdicts"]) == {tile["name"] for tile in data["verdicts"]}


def test_the_verdict_names_an_arm(results):
    assert any(arm.name in results["verdict"].splitlines()[0] for arm in make_arms())


def test_arms_differ_only_in_the_adapter():
    ranks = [arm.config.r * getattr(arm.config, "num_experts", 1) for arm in make_arms()]
    assert ranks == [16, 32, 32, 32]
    assert {arm.config.target_modules for arm in make_arms()} == {"all-linear"}
    assert {arm.config.lora_alpha / arm.config.r for arm in make_arms()} == {2.0}


def test_answer_nll_is_the_mean_over_the_answer_tokens_and_the_end():
    model, tokenizer = tiny("llama").eval(), toy_tokenizer()
    for row, value in zip(ROWS, answer_nll(model, tokenizer, ROWS), strict=True):
        prompt = tokenizer(row["prompt"] + "\n").input_ids
        answer = [*tokenizer(row["completion"]).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
        logp = logits.log_softmax(-1)
        wanted = [-logp[len(prompt) + i - 1, token].item() for i, token in enumerate(answer)]
        assert value == pytest.approx(sum(wanted) / len(wanted), rel=1e-5)


def test_a_batch_labels_only_the_answers():
    tokenizer = toy_tokenizer()
    batch = batch_of(tokenizer, ROWS, torch.device("cpu"))
    for row, labels in zip(ROWS, batch["labels"], strict=True):
        kept = labels[labels != -100].tolist()
        assert kept == [*tokenizer(row["completion"]).input_ids, tokenizer.eos_token_id]


def test_a_clear_winner_and_a_tie_are_told_apart():
    scores = {"good": [1.0, 1.1, 0.9, 1.0], "bad": [2.0, 2.1, 1.9, 2.04]}
    assert "bad: +1.010 ± 0.010" in verdict(scores)
    assert "clearly worse" in verdict(scores)
    tie = {"one": [1.0, 2.0, 1.0, 2.0], "two": [2.0, 1.0, 2.0, 1.1]}
    assert "within noise" in verdict(tie)


def test_the_standard_error_is_that_of_the_mean():
    mean = Mean.of([1.0, 2.0, 3.0, 4.0])
    assert mean.value == 2.5
    assert mean.error == pytest.approx(math.sqrt(5 / 3) / 2)
