"""Cases 69 to 72: a mixture is merged only by name, with its error, and exported to parity."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moeadapt
from moeadapt.errors import ConfigError, UnsupportedError
from tests.faults.cli import call
from tests.tiny import KINDS, LORA_KINDS, adapted, batch, logits, saved_base
from tests.toy import sentences, toy_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of every weight that is no adapter's."""
    named = model.named_parameters()
    return {n: p.detach().clone() for n, p in named if "moeadapt_" not in n and "lora_" not in n}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights are bitwise equal."""
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def broken(kind: str, value: float) -> Any:
    """Return a mixture with one expert that is not finite."""
    model = adapted("llama", kind)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n)[0, 0] = value
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", LORA_KINDS)
def test_fault_069_an_expert_that_is_not_finite_is_never_merged(
    kind: str, value: float, tmp_path: Path
) -> None:
    model = broken(kind, value)
    before = base_weights(model)
    with pytest.raises(ConfigError, match="lora_B of .* holds NaN or infinity"):
        moeadapt.merge(model, tmp_path / "out", "uniform")
    with pytest.raises(UnsupportedError, match="cannot merge"):
        model.merge_and_unload(safe_merge=True)
    with pytest.raises(UnsupportedError, match="cannot merge"):
        model.merge_adapter(safe_merge=True)
    assert same(base_weights(model), before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", LORA_KINDS)
def test_fault_070_merged_and_unmerged_the_base_is_restored(kind: str, tmp_path: Path) -> None:
    mixture = adapted("llama", kind)
    mixed = base_weights(mixture)
    lora = moeadapt.merge(mixture, tmp_path / "out", "uniform").model
    assert same(base_weights(mixture), mixed)
    before, expected = base_weights(lora), logits(lora, batch())
    lora.merge_adapter()
    assert not same(base_weights(lora), before)
    assert (logits(lora, batch()) - expected).abs().max() <= 1e-4
    lora.unmerge_adapter()
    after = base_weights(lora)
    assert max(float((after[n] - before[n]).abs().max()) for n in before) <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_fault_071_a_mixture_is_merged_only_by_an_explicit_method(
    kind: str, tmp_path: Path
) -> None:
    model = adapted("llama", kind)
    before = logits(model, batch())
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(UnsupportedError, match="moeadapt.merge"):
            merge()
    assert torch.equal(logits(model, batch()), before)
    with pytest.raises(ConfigError, match="least_squares"):
        moeadapt.merge(model, tmp_path / "out", "static")
    assert not list(tmp_path.iterdir())


def test_fault_071_the_error_of_a_merge_is_printed(tmp_path: Path) -> None:
    base = saved_base("llama", tmp_path)
    toy_tokenizer().save_pretrained(base)
    adapted("llama", "block").save_pretrained(tmp_path / "adapter")
    arguments = ["merge", str(tmp_path / "adapter"), "--base", base, "--out"]
    rows = [json.dumps({"text": text}) for text in sentences(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    data = ["--data", str(tmp_path / "rows.jsonl")]
    for name, options in (("merged", data), ("blind", [])):
        done = call(*arguments, str(tmp_path / name), "--method", "uniform", *options)
        assert done.code == 0, done.err
        said = "Mean residual: 0 is the mixture exactly" if options else "residual: not measured"
        assert said in " ".join(done.out.split())
        assert (tmp_path / name / "adapter_model.safetensors").is_file()
    # Without a method it is the one that measures, which needs data.
    assert call(*arguments, str(tmp_path / "other")).code == 2
    assert not (tmp_path / "other").exists()


def test_fault_072_an_export_has_the_logits_of_the_adapter(tmp_path: Path) -> None:
    receipt = moeadapt.export(adapted("llama", "ffn"), tmp_path / "out")
    measured = receipt.measured
    assert measured is not None
    assert measured.dtype == "float32"
    # Logits of 1 are compared to 1e-5; larger ones in proportion.
    assert measured.max_logit_difference <= 1e-5 * max(1.0, measured.largest_logit)
    assert measured.routing_agreement == (1.0, 1.0)
