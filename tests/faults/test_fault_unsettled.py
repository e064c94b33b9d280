"""Cases 1 to 3, 10 and 21 without the settings beside the weights, and saves that are refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils import save_and_load
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moeadapt import loading_options
from moeadapt.adapter_format.adapter import AdapterFiles
from moeadapt.errors import AdapterFileError, ConfigError, ExportError
from moeadapt.tuner import entry_points
from moeadapt.tuner.loading import loading
from tests.faults.loading_kit import (
    MANIFEST,
    SETTINGS,
    WEIGHTS,
    assert_untouched,
    base_model,
    expected_logits,
    fresh,
    state,
)
from tests.tiny import adapt, adapted, batch, logits, moe_config


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


SHADOW = torch.full((128, 32), 7.0)
"""Weights of the base in a file of an adapter."""


def padded(path: Path) -> None:
    path.write_text(path.read_text() + " " * (1 << 20))


def linked(path: Path) -> None:
    elsewhere = path.parent.parent / "elsewhere.json"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def doubled(path: Path) -> None:
    path.write_text(escaped(path).replace('"r": 4', '"r": 4, "r": 4'))


def deep(path: Path) -> None:
    path.write_text(escaped(path).replace('"r": 4', '"r": 4, "x": ' + "[" * 33 + "]" * 33))


def escaped(path: Path) -> str:
    return path.read_text().replace('"MOEADAPT"', '"MOE\\u0041DAPT"')


LENIENT = {
    padded: "is larger than 1048576 bytes",
    linked: "is a link to",
    doubled: "field 'r' is there twice",
    deep: "nested more than 32 deep",
}
"""What PEFT reads and we do not -> why."""

WAYS_IN = {
    "native": lambda base, folder: base.load_adapter(str(folder)),
    "auto": lambda base, folder: AutoModelForCausalLM.from_pretrained(str(folder)),
    "beside": lambda base, folder: adapt(base, moe_config("block")).load_adapter(folder, "two"),
    "new": lambda base, folder: PeftModel.from_pretrained(base, folder),
}


@pytest.mark.parametrize("way", WAYS_IN)
@pytest.mark.parametrize("weights", ["pickled", "late names"])
@pytest.mark.parametrize("change", LENIENT, ids=lambda change: change.__name__)
def test_fault_033_settings_that_only_peft_would_read_are_no_way_around(
    tmp_path, change, weights, way, monkeypatch
):
    """Nothing else in the folder says whose it is."""
    folder, base = fresh(tmp_path), base_model()
    tensors = {**load_file(folder / WEIGHTS), "base_model.model.lm_head.weight": SHADOW}
    (folder / MANIFEST).unlink()
    if weights == "pickled":
        (folder / WEIGHTS).unlink()
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / WEIGHTS, metadata={"a": "x" * (1 << 17)})
    change(folder / SETTINGS)
    before = state(base)
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(AdapterFileError, match=f"{SETTINGS}: .*{LENIENT[change]}"):
        WAYS_IN[way](base, folder)
    assert_untouched(base, before)
    added = "two" if way == "beside" else "moeadapt"
    assert not any(added in name for name, _ in base.named_modules())


def test_fault_033_settings_that_change_after_the_check_are_refused(tmp_path, monkeypatch):
    """The strict reading saw those of another method, and PEFT sees ours."""
    folder, base = fresh(tmp_path), base_model()
    monkeypatch.setattr(entry_points, "read_config", lambda folder: None)
    with pytest.raises(AdapterFileError, match="it changed in between"):
        PeftModel.from_pretrained(base, folder)
    assert not hasattr(base, "peft_config")


def test_fault_014_weights_exchanged_for_pickled_ones_change_nothing(tmp_path, monkeypatch):
    folder, original = fresh(tmp_path), AdapterFiles.read

    def exchange(self: AdapterFiles) -> Any:
        tensors = original(self)
        if (folder / WEIGHTS).exists():
            (folder / WEIGHTS).rename(folder / "adapter_model.bin")
        return tensors

    monkeypatch.setattr(AdapterFiles, "read", exchange)
    loads_as_before(folder)
    assert not (folder / WEIGHTS).exists()


def test_fault_014_only_what_was_opened_is_read_while_an_adapter_is_loaded(tmp_path):
    other = fresh(tmp_path / "other") / WEIGHTS
    with loading(AdapterFiles(fresh(tmp_path))):
        for read in (save_and_load.safe_load_file, save_and_load.torch_load):
            with pytest.raises(AdapterFileError, match="was about to be loaded in place of"):
                read(str(other))


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
