"""Case 74, seen by a reader: numbers loaded into an adapter that is there with its own settings."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from moeadapt.errors import AdapterFileError
from tests.faults.loading_kit import state
from tests.tiny import adapted, batch, logits, tiny


def assert_same(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Assert that every tensor is bitwise that of before."""
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_fault_074_a_name_loaded_twice_with_other_sizes_is_refused(tmp_path: Path) -> None:
    adapted("llama", "block", num_experts=2).save_pretrained(tmp_path)
    model = adapted("llama", "block")
    before = state(model)
    with pytest.raises(AdapterFileError, match="num_experts: 4 on the model, 2 in the folder"):
        model.load_adapter(str(tmp_path), "default")
    assert_same(model, before)


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "scale": ({"lora_alpha": 64}, "lora_alpha: 8 on the model, 64 in the folder"),
    "experts per token": (
        {"router": {"name": "top_k", "k": 1, "init_std": 0.5}},
        "router: .*'k': 2",
    ),
    "dropout": ({"lora_dropout": 0.5}, "lora_dropout: 0.0 on the model, 0.5 in the folder"),
}


@pytest.mark.parametrize(("fields", "words"), list(OTHERS.values()), ids=list(OTHERS))
def test_fault_074_a_name_loaded_twice_with_other_settings_of_the_same_sizes_is_refused(
    fields: dict[str, Any], words: str, tmp_path: Path
) -> None:
    adapted("llama", "block", seed=5, **fields).save_pretrained(tmp_path)
    model = adapted("llama", "block")
    before = state(model)
    with pytest.raises(AdapterFileError, match=f"adapter 'default' of the model.*\n  {words}"):
        model.load_adapter(str(tmp_path), "default")
    assert_same(model, before)
    model.load_adapter(str(tmp_path), "second")


def test_fault_074_settings_said_in_another_way_are_the_same(tmp_path: Path) -> None:
    targets = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    adapted("llama", "block", target_modules=targets, impl="gather").save_pretrained(tmp_path)
    model = adapted("llama", "block", seed=5, target_modules=r".*\.\w+_proj", impl="concat")
    model.load_adapter(str(tmp_path), "default")
    assert torch.equal(
        logits(model.eval(), batch()), logits(adapted("llama", "block", impl="concat"), batch())
    )


def test_fault_074_an_adapter_of_another_type_is_not_replaced_by_a_mixture(tmp_path: Path) -> None:
    adapted("llama", "block").save_pretrained(tmp_path)
    model = get_peft_model(tiny("llama"), LoraConfig(target_modules=["q_proj"]))
    before = state(model)
    with pytest.raises(AdapterFileError, match="'default' of the model is of .*LORA"):
        model.load_adapter(str(tmp_path), "default")
    assert_same(model, before)
