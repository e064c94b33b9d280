"""Every model and kind through transformers' own adapter methods, without a `PeftModel`."""

from pathlib import Path

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.peft.saved import Saved
from tests.tiny import CASES, adapt, logits, moe_config

pytestmark = pytest.mark.parametrize(("name", "kind"), CASES)


def test_native_add_adapter_computes_what_peft_does(saved: Saved) -> None:
    model = saved.base()
    torch.manual_seed(5)
    model.add_adapter(moe_config(saved.kind), "mine")
    wrapped = adapt(saved.base(), moe_config(saved.kind), seed=5)
    assert model.active_adapters() == ["mine"]
    assert torch.equal(logits(model, saved.inputs), logits(wrapped, saved.inputs))


@pytest.mark.parametrize("adapter", ["default", "other"])
def test_native_load_adapter_gives_the_saved_outputs(saved: Saved, adapter: str) -> None:
    model = saved.base()
    report = model.load_adapter(saved.adapter_dir, adapter)
    assert not report.missing_keys
    assert not report.unexpected_keys
    assert torch.equal(logits(model, saved.inputs), saved.logits)


def test_from_pretrained_of_an_adapter_folder_loads_base_and_adapter(saved: Saved) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved.adapter_dir).eval()
    assert type(model) is type(saved.base())
    assert torch.equal(logits(model, saved.inputs), saved.logits)


def test_native_disable_is_bitwise_the_base_and_enable_undoes_it(saved: Saved) -> None:
    model = saved.base()
    model.load_adapter(saved.adapter_dir)
    model.disable_adapters()
    assert torch.equal(logits(model, saved.inputs), saved.base_logits)
    model.enable_adapters()
    assert torch.equal(logits(model, saved.inputs), saved.logits)


def test_native_delete_leaves_the_base(saved: Saved) -> None:
    model = saved.base()
    model.load_adapter(saved.adapter_dir)
    model.delete_adapter("default")
    assert not hasattr(model, "peft_config")
    assert not [n for n, _ in model.named_parameters() if "moeadapt" in n]
    assert torch.equal(logits(model, saved.inputs), saved.base_logits)


def test_native_second_adapter_can_be_set_and_deleted(saved: Saved) -> None:
    model = saved.base()
    model.load_adapter(saved.adapter_dir, "first")
    with pytest.warns(UserWarning, match="multiple adapters"):
        model.add_adapter(moe_config(saved.kind, num_experts=3, r=2), "second")
    assert not torch.allclose(logits(model, saved.inputs), saved.logits, atol=1e-2)
    model.set_adapter("first")
    assert torch.equal(logits(model, saved.inputs), saved.logits)
    model.delete_adapter("second")
    assert torch.equal(logits(model, saved.inputs), saved.logits)


def test_an_adapter_can_come_back_after_all_were_deleted(saved: Saved) -> None:
    model = saved.base()
    model.load_adapter(saved.adapter_dir)
    model.delete_adapter("default")
    model.load_adapter(saved.adapter_dir)
    assert torch.equal(logits(model, saved.inputs), saved.logits)


def test_native_save_writes_the_same_adapter(saved: Saved, tmp_path: Path) -> None:
    model = saved.base()
    model.load_adapter(saved.adapter_dir)
    assert len([m for m in model.modules() if isinstance(m, BaseTunerLayer)]) > 0
    model.save_pretrained(tmp_path)
    before = load_file(f"{saved.adapter_dir}/adapter_model.safetensors")
    after = load_file(tmp_path / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_the_adapters_tensors_can_be_read_natively(saved: Saved) -> None:
    model = saved.base()
    model.load_adapter(saved.adapter_dir)
    tensors = load_file(f"{saved.adapter_dir}/adapter_model.safetensors")
    read = model.get_adapter_state_dict()
    assert {f"base_model.model.{n}" for n in read} == set(tensors)
