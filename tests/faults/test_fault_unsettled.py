"""Cases 1 to 3, 10 and 21 without the settings beside the weights, and saves that are refused."""

import json
import os
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from moeadapt import loading_options
from moeadapt.errors import AdapterFileError, ConfigError, ExportError
from tests.faults.loading_kit import SETTINGS, WEIGHTS, base_model, expected_logits, fresh, state
from tests.tiny import adapted, batch, logits, moe_config


def with_config(folder: Path) -> None:
    PeftModel.from_pretrained(base_model(), folder, config=moe_config("ffn"))


def by_replacing(folder: Path) -> None:
    adapted("llama", "ffn").load_adapter(folder, "default")


@pytest.mark.parametrize("load", [with_config, by_replacing])
@pytest.mark.parametrize("change", ["missing", "another", "pickled"])
def test_fault_021_weights_without_our_settings_are_refused(tmp_path, load, change):
    folder = fresh(tmp_path)
    path = folder / SETTINGS
    if change == "another":
        path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": "LORA"}))
    else:
        path.unlink()
    if change == "pickled":
        torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
        (folder / WEIGHTS).unlink()
    with pytest.raises(AdapterFileError, match=SETTINGS):
        load(folder)


@pytest.mark.parametrize("kind", ["MOEADAPU", "moeadapt", "LORA"])
def test_fault_033_our_weights_under_another_type_are_refused(tmp_path, kind):
    folder = fresh(tmp_path)
    path, base = folder / SETTINGS, base_model()
    before = state(base)
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": kind}))
    with pytest.raises(AdapterFileError, match=f"field peft_type is '{kind}'"):
        PeftModel.from_pretrained(base, folder)
    assert all(torch.equal(value, before[name]) for name, value in state(base).items())


def loads_as_before(folder: Path) -> None:
    loaded = PeftModel.from_pretrained(base_model(), folder).eval()
    assert torch.equal(logits(loaded, batch()), expected_logits())


def test_fault_087_a_broken_adapter_does_not_replace_a_whole_one(tmp_path):
    folder = fresh(tmp_path)
    model = PeftModel.from_pretrained(base_model(), folder)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n)[0, 0] = float("nan")
    with pytest.raises(ExportError, match="holds NaN or infinity"):
        model.save_pretrained(folder)
    loads_as_before(folder)
    with loading_options(allow_nonfinite=True):
        model.save_pretrained(tmp_path / "kept")
    assert (tmp_path / "kept" / WEIGHTS).is_file()


def test_fault_001_a_pickled_file_is_not_written_over_a_whole_adapter(tmp_path):
    folder = fresh(tmp_path)
    model = PeftModel.from_pretrained(base_model(), folder)
    for save in (
        lambda: model.save_pretrained(folder, safe_serialization=False),
        lambda: model.save_pretrained(folder, False),
    ):
        with pytest.raises(ConfigError, match="safe_serialization=False"):
            save()
    loads_as_before(folder)


def test_an_empty_name_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="save_directory is empty"):
        adapted("llama", "ffn").save_pretrained("")
    assert os.listdir(tmp_path) == []
