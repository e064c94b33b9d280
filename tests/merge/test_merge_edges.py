"""What comes along with the experts, and what is refused because it is broken."""

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close

import moeadapt
from moeadapt import surgery
from moeadapt.errors import ConfigError
from tests.export.bases import base
from tests.tiny import adapt, batch, logits, moe_config


@pytest.mark.parametrize("tokens", [[3, 5], {"embed_tokens": [3, 5]}], ids=["list", "dict"])
@pytest.mark.parametrize("name", ["llama", "llama, tied, llama3 rope"])
def test_trained_tokens_come_along(name, tokens, tmp_path):
    model = adapt(base(name), moe_config("ffn", router="uniform", trainable_token_indices=tokens))
    with torch.no_grad():
        deltas = [p for n, p in model.named_parameters() if "trainable_tokens_delta" in n]
        assert deltas
        for delta in deltas:
            delta.add_(1.0)
    edited = surgery.reorder_experts(model, [1, 0, 3, 2]).model
    assert_close(logits(edited, batch()), logits(model, batch()), rtol=0.0, atol=1e-4)
    merged = moeadapt.merge(model, tmp_path / "merged", "uniform").model
    loaded = PeftModel.from_pretrained(base(name), str(tmp_path / "merged")).eval()
    assert torch.equal(logits(loaded, batch()), logits(merged, batch()))
    for lora, mixture in zip(
        (p for n, p in loaded.named_parameters() if "trainable_tokens_delta" in n),
        deltas,
        strict=True,
    ):
        assert torch.equal(lora, mixture)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("verb", [moeadapt.merge, moeadapt.split])
def test_an_adapter_that_is_not_finite_is_refused(verb, value, tmp_path):
    model = adapt(base("llama"), moe_config("ffn"))
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_A" in n)[0, 0] = value
    with pytest.raises(ConfigError, match=r"lora_A of .* holds NaN or infinity"):
        verb(model, tmp_path / "out", **({"method": "uniform"} if verb is moeadapt.merge else {}))
    assert not list(tmp_path.iterdir())
