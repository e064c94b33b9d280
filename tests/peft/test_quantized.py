"""Quantised bases on CPU: the experts beside a base layer that PEFT's backends resolve.

Each backend comes in its own package; a machine without it skips its cases.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from moeadapt.tuner import MoeLoraLinear
from tests.tiny import (
    KINDS,
    LORA_KINDS,
    adapt,
    batch,
    gradients,
    labels_of,
    logits,
    moe_config,
    tiny,
)

# The packages' own; what our code causes would still fail.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning"),
]


def _bnb4() -> Any:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )


def _bnb8() -> Any:
    return BitsAndBytesConfig(load_in_8bit=True)


def _torchao() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


BACKENDS: dict[str, tuple[str, Callable[[], Any], str]] = {
    "bnb4": ("bitsandbytes", _bnb4, "Linear4bit"),
    "bnb8": ("bitsandbytes", _bnb8, "Linear8bitLt"),
    "torchao": ("torchao", _torchao, "Linear"),
}


@pytest.fixture(params=sorted(BACKENDS))
def quantized(request, tmp_path_factory) -> Callable[[], PreTrainedModel]:
    """Return a function that loads the quantised base."""
    package, make, layer = BACKENDS[request.param]
    with _imports_may_warn():
        pytest.importorskip(package)
        config = make()
    folder = tmp_path_factory.mktemp("quantized")
    # bitsandbytes packs its 4-bit weights for CPU in blocks of 64.
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
    tiny("llama", **sizes).save_pretrained(folder)

    def load() -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=config,
            device_map={"": "cpu"},
            dtype=torch.float32,
        ).eval()
        assert type(_linear(model)).__name__ == layer
        return model

    return load


@contextmanager
def _imports_may_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _linear(model: nn.Module) -> nn.Module:
    return model.get_submodule("model.layers.0.mlp.up_proj")


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_nothing(kind: str, quantized) -> None:
    base = quantized()
    expected = logits(base, batch())
    model = adapt(base, moe_config(kind, init_lora_weights=True))
    assert_close(logits(model, batch()), expected, atol=1e-4, rtol=1e-4)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch()), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_adapter_tensor_and_no_base_weight(kind: str, quantized) -> None:
    base = prepare_model_for_kbit_training(quantized(), use_gradient_checkpointing=False)
    model = adapt(base, moe_config(kind, balance={"switch": 0.1})).train()
    found = gradients(model, batch())
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(found) == trained
    assert all("moeadapt_" in n for n in trained)
    assert all(g.isfinite().all() and g.any() for g in found.values())


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_down_the_gradient_lowers_the_loss(kind: str, quantized) -> None:
    model = adapt(quantized(), moe_config(kind)).train()
    inputs = {**batch(), "labels": labels_of(batch())}
    before = model(**inputs).loss
    before.backward()
    size = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(1e-2 * parameter.grad / size.sqrt())
        assert model(**inputs).loss < before


@pytest.mark.parametrize("kind", KINDS)
def test_saving_and_loading_gives_the_same_outputs(kind: str, quantized, tmp_path: Path) -> None:
    model = adapt(quantized(), moe_config(kind))
    expected = logits(model, batch())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized(), str(tmp_path)).eval()
    assert torch.equal(logits(loaded, batch()), expected)


@pytest.mark.parametrize("kind", LORA_KINDS)
def test_one_expert_on_a_quantised_base_is_plain_lora(kind: str, quantized) -> None:
    lora = adapt(quantized(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    ours = adapt(quantized(), moe_config(kind, num_experts=1, router="uniform"))
    theirs = dict(lora.named_parameters())
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "moeadapt_" in name:
                theirs[name.replace("moeadapt_", "")].copy_(parameter)
    assert_close(logits(ours, batch()), logits(lora, batch()), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_layer_is_seen_and_never_merged(kind: str, quantized) -> None:
    model = get_peft_model(quantized(), moe_config(kind))
    layers = [m for m in model.modules() if isinstance(m, MoeLoraLinear)]
    # Small FFNs hang on the output projection; the FFN's other two linears stay as they are.
    assert len(layers) == (10 if kind == "glu" else 14)
    assert all(layer.quantization_backend is not None for layer in layers)
    with pytest.raises(NotImplementedError, match="model.unload"):
        model.merge_and_unload()
