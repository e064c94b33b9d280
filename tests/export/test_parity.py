"""What is checked of a written mixture, what is refused, and what the receipt then says."""

import importlib

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig

import moeadapt
from moeadapt.errors import ConfigError, ExportError
from moeadapt.export.mixture import Mixture
from moeadapt.export.receipt import Measured
from moeadapt.export.verify import load_strictly
from tests.export.bases import base, token_ids
from tests.tiny import adapt, logits, moe_config

parity = importlib.import_module("moeadapt.export.parity")

TOLERANCE = {"rtol": 0.0, "atol": 1e-4}
TEXT = {"input_ids": token_ids()}


def mixture(name):
    return adapt(base(name), moe_config("ffn"))


def test_bfloat16_is_measured_and_promises_nothing_unless_asked(tmp_path):
    model = mixture("llama")
    receipt = moeadapt.export(model, tmp_path / "moe", dtype=torch.bfloat16)
    assert receipt.tolerance is None
    assert 1e-3 < receipt.measured.max_logit_difference < 1.0
    assert set(receipt.dtype) == {"BF16"}
    with pytest.raises(moeadapt.errors.ExportError, match=r"differ by \d.* allowed 1\.0e-03"):
        moeadapt.export(model, tmp_path / "strict", dtype=torch.bfloat16, tolerance=1e-3)
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


def test_another_gate_on_disk_is_seen_in_the_routing(tmp_path, monkeypatch):
    model = mixture("llama")
    right = Mixture.gate
    monkeypatch.setattr(
        Mixture, "gate", lambda self, layer: right(self, layer).flip(0) if layer else right(self, 0)
    )
    receipt = moeadapt.export(model, tmp_path / "moe", tolerance=100.0)
    first, second = receipt.measured.routing_agreement
    assert first == 1.0
    assert second < 0.7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_gate_on_disk_is_refused_whatever_the_dtype(dtype, tmp_path, monkeypatch):
    model = adapt(base("llama").to(dtype), moe_config("ffn"))
    right = Mixture.gate
    monkeypatch.setattr(Mixture, "gate", lambda self, layer: right(self, layer).flip(0))
    with pytest.raises(ExportError, match="is not the adapter"):
        moeadapt.export(model, tmp_path / "moe")
    assert not list(tmp_path.iterdir())


def test_logits_that_are_not_finite_are_refused(tmp_path, monkeypatch):
    model = mixture("llama")
    real = parity.logits_of

    def broken(found, ids):
        logits = real(found, ids)
        if getattr(found.config, "_experts_implementation", None) == "grouped_mm":
            logits[0][0, 0, 0] = float("nan")
        return logits

    monkeypatch.setattr(parity, "logits_of", broken)
    with pytest.raises(ExportError, match="NaN or infinite logits with the experts 'grouped_mm'"):
        moeadapt.export(model, tmp_path / "moe")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seed", [12, 14, 21])
def test_rounding_alone_is_not_taken_for_a_mistake(seed, tmp_path, monkeypatch):
    model = adapt(base("llama", seed=seed), moe_config("ffn", router={"name": "top_k", "k": 2}))
    monkeypatch.setattr(Measured, "float32_tolerance", 1e-9)
    receipt = moeadapt.export(model, tmp_path / "moe")
    assert receipt.measured.max_logit_difference > 1e-9
    assert 0 < receipt.settings["float64_difference"] < 5e-5
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("width", [30, 36])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_widths_that_grouped_kernels_lack_are_filled_up(width, dtype, tmp_path):
    model = adapt(base("llama", intermediate_size=width), moe_config("ffn"))
    receipt = moeadapt.export(model, tmp_path / "moe", dtype=dtype)
    assert receipt.settings["expert_width"] == -(-width // 8) * 8
    found = load_strictly(tmp_path / "moe", dtype)
    found.set_experts_implementation("grouped_mm")
    tolerance = 1e-4 if dtype == torch.float32 else 1.0
    assert_close(logits(found, TEXT).float(), logits(model, TEXT), rtol=0.0, atol=tolerance)


def test_without_verification_nothing_is_loaded_and_the_receipt_says_so(tmp_path, monkeypatch):
    model = mixture("llama")
    monkeypatch.setattr(parity, "load_strictly", None)
    receipt = moeadapt.export(model, tmp_path / "moe", verify=False)
    assert receipt.measured is None
    assert receipt.tolerance is None
    monkeypatch.undo()
    found = load_strictly(tmp_path / "moe")
    assert_close(logits(found, TEXT), logits(model, TEXT), **TOLERANCE)
    with pytest.raises(ConfigError, match="verify=False"):
        moeadapt.export(model, tmp_path / "other", verify=False, tolerance=1e-3)


def test_a_base_in_bfloat16_is_written_so(tmp_path):
    model = adapt(base("llama").bfloat16(), moe_config("ffn"))
    receipt = moeadapt.export(model, tmp_path / "moe")
    assert set(receipt.dtype) == {"BF16"}
    assert receipt.measured.dtype == "bfloat16"
    assert AutoConfig.from_pretrained(tmp_path / "moe").dtype == torch.bfloat16
