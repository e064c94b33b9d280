"""The base an adapter is for, and the manifest that remembers it: cases 45 and 46, and saving."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

import moeadapt
from moeadapt.adapter_format.fingerprint import fingerprint
from moeadapt.version import FORMAT_VERSION, __version__
from tests.faults.loading_kit import (
    MANIFEST,
    SETTINGS,
    WEIGHTS,
    assert_loads,
    assert_untouched,
    base_model,
    by_from_pretrained,
    by_load_adapter,
    by_replacing,
    expected_logits,
    fresh,
    natively,
    refusal,
    shelf,
    state,
)
from tests.tiny import adapt, batch, logits, moe_config, tiny

OTHERS: dict[str, Any] = {
    "weights": lambda: tiny("llama", seed=3),
    "heads": lambda: tiny("llama", num_key_value_heads=4),
    "layers": lambda: tiny("llama", num_hidden_layers=3),
    "architecture": lambda: tiny("mistral"),
}


def edit_base(folder: Path, **fields: Any) -> Path:
    """Change what the manifest says of the base."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["base"].update(fields)
    path.write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("way", [by_from_pretrained, natively])
def test_fault_045_another_base_is_refused_unless_the_caller_allows_it(tmp_path, name, way):
    folder, base = fresh(tmp_path), OTHERS[name]()
    before = state(base)
    with refusal("was trained on another base|was made for .*this base has"):
        way(base, folder)
    assert_untouched(base, before)
    with moeadapt.loading_options(allow_other_base=True):
        if name != "heads":
            way(base, folder)
            assert_untouched(base, before)
        else:
            with refusal("adapter_model.safetensors: "):  # the shapes still differ
                way(base, folder)


def test_fault_045_an_adapter_on_the_model_is_not_replaced_by_one_of_another_base(tmp_path):
    folder = tmp_path / "other"
    adapt(tiny("llama", seed=3), moe_config("block")).save_pretrained(folder)
    for way in (by_replacing, by_load_adapter):
        with refusal("was trained on another base"):
            way(base_model(), folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_fault_045_the_same_base_in_another_type_is_the_same_base(tmp_path, dtype):
    model = by_from_pretrained(base_model().to(dtype), fresh(tmp_path))
    again = tmp_path / "again"
    model.save_pretrained(again)
    by_from_pretrained(base_model(), again)
    with refusal("another base"):
        by_from_pretrained(tiny("llama", seed=3).to(dtype), again)


def test_fault_045_a_base_whose_numbers_cannot_be_read_is_told_by_its_configuration(tmp_path):
    folder, base = fresh(tmp_path), tiny("llama", seed=3)
    assert fingerprint(base.to("meta"))["weights"] == {}
    edit_base(folder, weights={})
    by_from_pretrained(tiny("llama", seed=3), folder)
    with refusal("made for num_key_value_heads 2, this base has 4"):
        by_from_pretrained(OTHERS["heads"](), folder)


@pytest.mark.parametrize("field", ["name", "revision"])
def test_fault_045_046_another_name_or_revision_warns_where_equality_is_not_proved(tmp_path, field):
    folder = edit_base(fresh(tmp_path), **{field: "someone/base"})
    base = base_model()
    other = base_model().to(torch.bfloat16)
    attribute = "name_or_path" if field == "name" else "_commit_hash"
    for model in (base, other):
        setattr(model if field == "name" else model.config, attribute, "other/base")
    by_from_pretrained(base, folder)  # equal to the last digit: the name says nothing more
    with pytest.warns(UserWarning, match=f"base {field} 'someone/base', this is 'other/base'"):
        by_from_pretrained(other, folder)


def test_fault_046_another_vocabulary_warns(tmp_path):
    base = base_model()
    base.resize_token_embeddings(140)
    with pytest.warns(UserWarning, match="vocabulary of 128, this base has 140"):
        model = by_from_pretrained(base, fresh(tmp_path)).eval()
    assert torch.equal(logits(model, batch())[..., :128], expected_logits())


# --- saving


def assert_sealed(folder: Path) -> dict[str, Any]:
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["format_version"] == FORMAT_VERSION
    assert manifest["moeadapt_version"] == __version__
    for name in (SETTINGS, WEIGHTS):
        found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        assert manifest["files"][name] == found
    assert manifest["base"]["config"]["hidden_size"] == 32
    assert len(manifest["base"]["weights"]) == 8
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    return manifest


def test_saving_writes_a_manifest_for_each_adapter_and_none_for_others(tmp_path):
    model = adapt(base_model(), moe_config("block"))
    model.add_adapter("two", moe_config("layer"))
    model.save_pretrained(tmp_path / "a")
    assert_sealed(tmp_path / "a")
    assert_sealed(tmp_path / "a" / "two")
    model.save_pretrained(tmp_path / "b", selected_adapters=["two"])
    assert not (tmp_path / "b" / MANIFEST).exists()
    model.save_pretrained(tmp_path / "c", is_main_process=False)
    assert not (tmp_path / "c" / MANIFEST).exists()
    get_peft_model(base_model(), LoraConfig()).save_pretrained(tmp_path / "d")
    assert not (tmp_path / "d" / MANIFEST).exists()
    base_model().save_pretrained(tmp_path / "e")
    assert not (tmp_path / "e" / MANIFEST).exists()


def test_saving_natively_writes_a_manifest_that_loads(tmp_path):
    model = base_model()
    model.load_adapter(str(shelf() / "adapter"))
    model.save_pretrained(tmp_path / "a")
    first = assert_sealed(tmp_path / "a")
    model.get_submodule("model.layers.0.self_attn.q_proj").moeadapt_lora_A.default.weight.data += 1
    expected = logits(model.eval(), batch())
    model.save_pretrained(tmp_path / "a")
    assert assert_sealed(tmp_path / "a")["files"] != first["files"]
    loaded = by_from_pretrained(base_model(), tmp_path / "a").eval()
    assert torch.equal(logits(loaded, batch()), expected)


def test_a_save_that_breaks_leaves_the_adapter_that_was_there(tmp_path, monkeypatch):
    folder = fresh(tmp_path)
    model = by_from_pretrained(base_model(), folder)
    monkeypatch.setattr(
        type(model.peft_config["default"]), "save_pretrained", lambda *a, **k: 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(folder)
    assert_sealed(folder)
    assert_loads(folder)


def test_an_adapter_from_before_manifests_loads_with_a_warning(tmp_path):
    folder = fresh(tmp_path)
    (folder / MANIFEST).unlink()
    with pytest.warns(UserWarning, match="has no moeadapt_manifest.json"):
        model = PeftModel.from_pretrained(base_model(), folder).eval()
    assert torch.equal(logits(model, batch()), expected_logits())


def test_checkpoints_of_a_trainer_are_sealed_and_resume(tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 128, (8, 5))]
    settings: dict[str, Any] = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 2,
        "save_steps": 2,
        "max_steps": 4,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    model = adapt(base_model(), moe_config("block")).train()
    Trainer(model, TrainingArguments(**settings), train_dataset=rows).train()
    assert_sealed(tmp_path / "checkpoint-2")
    again = Trainer(
        adapt(base_model(), moe_config("block"), seed=5).train(),
        TrainingArguments(**settings),
        train_dataset=rows,
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    ends = zip(model.named_parameters(), again.model.named_parameters(), strict=True)
    assert all(torch.equal(a, b) for (_, a), (_, b) in ends)
    wider = adapt(base_model(), moe_config("block", r=8)).train()
    broken = Trainer(wider, TrainingArguments(**settings), train_dataset=rows)
    with refusal("r: 8 on the model, 4 in the folder"):
        broken.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("said", [None, {}, "llama"])
def test_fault_045_a_manifest_that_names_no_base_is_told(tmp_path, said):
    folder = fresh(tmp_path)
    path = folder / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "base": said}))
    with pytest.warns(UserWarning, match="does not say on which base"):
        by_from_pretrained(base_model(), folder)
