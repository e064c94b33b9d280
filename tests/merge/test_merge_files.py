"""What a merge reports, writes, leaves alone and refuses: an ordinary LoRA always."""

import json
import subprocess
import sys

import pytest
import torch
from peft import PeftModel

import moeadapt
from moeadapt.errors import ConfigError, UnsupportedError
from moeadapt.tuner.plain import adapter_layers
from tests.merge.dense import always, deltas, num_experts
from tests.merge.kit import batches, mixture
from tests.tiny import adapted, batch, logits, saved_base, tiny


def test_losses_are_reported_per_domain():
    data = batches()
    names = [("even", "odd")[i % 2] for i in range(3 * len(data))]
    result = moeadapt.merge(
        mixture(), data=data, domains=names, held_out=data[:2], held_out_domains=names[:6]
    )
    assert result.held_out
    table = result.to_dict()["losses"]
    assert set(table) == {"mixture", "merged", "base"}
    for name, model in (
        ("mixture", mixture()),
        ("merged", result.model),
        ("base", tiny("llama").double()),
    ):
        rows = {"even": [], "odd": []}
        for inputs in data[:2]:
            logp = logits(model, inputs).log_softmax(-1)
            for row in range(3):
                ids, mask = inputs["input_ids"][row], inputs["attention_mask"][row]
                told = [-logp[row, t, ids[t + 1]].item() for t in range(8) if mask[t + 1]]
                rows[
                    ("even", "odd")[row % 2] if inputs is data[0] else ("odd", "even")[row % 2]
                ] += told
        every = rows["even"] + rows["odd"]
        assert table[name]["mean"] == pytest.approx(sum(every) / len(every), rel=1e-5)
        for domain, told in rows.items():
            found = table[name]["by_domain"][domain]
            assert found == pytest.approx(sum(told) / len(told), rel=1e-5)


def test_merging_leaves_the_mixture_alone():
    model = mixture("ffn").train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    result = moeadapt.merge(model, data=batches())
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    mine = {p.data_ptr() for p in model.parameters()}
    copied = [n for n, p in result.model.named_parameters() if p.data_ptr() not in mine]
    assert copied
    assert all("lora_" in name for name in copied)


def test_a_group_of_layers_at_a_time_measures_the_same():
    whole = moeadapt.merge(mixture(), data=batches())
    parts = moeadapt.merge(mixture(), data=batches(), memory=1.0)
    assert whole.residuals == parts.residuals


PLAIN = """
import sys
sys.modules["moeadapt"] = None
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, inputs, out = sys.argv[1:]
base = AutoModelForCausalLM.from_pretrained(base).double()
model = PeftModel.from_pretrained(base, adapter).eval()
assert type(model.peft_config["default"]).__name__ == "LoraConfig"
with torch.no_grad():
    torch.save(model(**torch.load(inputs)).logits, out)
print(sorted(name for name in sys.modules if name.startswith("moeadapt")))
"""


@pytest.mark.parametrize("kind", ["layer", "ffn"])
def test_the_adapter_loads_where_moeadapt_is_not_installed(tmp_path, kind):
    base = saved_base("llama", tmp_path)
    model = mixture(kind, modules_to_save=["lm_head"], rank_pattern={"q_proj": 2})
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(0.5)
    moeadapt.merge(model, tmp_path / "merged", method="uniform")
    expected = tiny("llama").double()
    with torch.no_grad():
        expected.lm_head.weight.mul_(0.5)
        for key, layer in adapter_layers(model).items():
            own, count = deltas(layer), num_experts(layer)
            routed = layer.moe_plans["default"].placement != "unrouted"
            mean = sum(own[:count]) / count if routed else 0
            expected.get_submodule(key).weight.add_(mean + always(layer))
    torch.save(batch(), tmp_path / "inputs.pt")
    args = [base, tmp_path / "merged", tmp_path / "inputs.pt", tmp_path / "logits.pt"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PLAIN, *map(str, args)],
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip().endswith("['moeadapt']"), done.stderr[-2000:]
    torch.testing.assert_close(
        torch.load(tmp_path / "logits.pt"), logits(expected, batch()), rtol=1e-4, atol=1e-4
    )
    config = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["modules_to_save"] == ["lm_head"]
    assert set(config["target_modules"]) <= {
        f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")
    }


def test_a_written_adapter_answers_as_the_result_does(tmp_path):
    model = adapted("gpt2", "ffn", n_shared=1)
    result = moeadapt.merge(model, tmp_path / "merged", data=batches())
    loaded = PeftModel.from_pretrained(tiny("gpt2"), str(tmp_path / "merged")).eval()
    assert torch.equal(logits(loaded, batch()), logits(result.model, batch()))


@pytest.mark.parametrize("experts", ["ia3", "random_a"])
def test_experts_that_are_no_matrices_are_refused(tmp_path, experts):
    model = adapted("llama", "layer", experts=experts, init_lora_weights=True)
    with pytest.raises(UnsupportedError, match=f"'{experts}'.*moeadapt.distill"):
        moeadapt.merge(model, tmp_path / "out", method="uniform")
    assert not list(tmp_path.iterdir())


UNLABELLED = {**batch(), "labels": torch.full_like(batch()["input_ids"], -100)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "least_squares"}, "give data="),
        ({"method": "ties"}, "unknown merge method 'ties'"),
        ({"method": "single", "expert": 4}, "has the experts 0..3"),
        ({"method": "single"}, "needs expert="),
        ({"method": "usage", "expert": 1}, "belongs to method='single'"),
        ({"method": "uniform", "rank": 0}, "at least 1"),
        ({"method": "uniform", "adapter": "other"}, "no moeadapt adapter 'other'"),
        ({"method": "uniform", "data": []}, "empty"),
        ({"method": "uniform", "data": ["a text"]}, "tokenizer="),
        ({"method": "svd", "rank": 2}, "less than the 4 experts"),
        ({"method": "uniform", "held_out": [UNLABELLED]}, "every label of the data is ignored"),
    ],
)
def test_a_wrong_request_writes_nothing(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        moeadapt.merge(mixture(), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not an empty folder"):
        moeadapt.merge(mixture(), tmp_path / "out", method="uniform")


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def broken(self, folder, **options):
        (__import__("pathlib").Path(folder) / "adapter_config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(PeftModel, "save_pretrained", broken)
    with pytest.raises(OSError, match="disk full"):
        moeadapt.merge(mixture(), tmp_path / "out", method="uniform")
    assert not list(tmp_path.iterdir())
