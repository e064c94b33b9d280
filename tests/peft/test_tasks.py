"""Heads and backbones other than the language model's."""

from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForSequenceClassification,
    PeftModel,
    PeftModelForFeatureExtraction,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from moeadapt import collect_routing
from tests.tiny import CASES, KINDS, adapt, batch, logits, moe_config, tiny

core = pytest.mark.parametrize(("name", "kind"), CASES)
CLASSES = 5
LABELS = torch.tensor([0, 3, 4])


def _classifier(name: str) -> Any:
    return tiny(name, auto=AutoModelForSequenceClassification, num_labels=CLASSES)


@core
def test_a_fresh_adapter_leaves_a_classifier_bitwise(name: str, kind: str) -> None:
    config = moe_config(kind, task_type="SEQ_CLS", init_lora_weights=True)
    model = adapt(_classifier(name), config)
    assert isinstance(model, PeftModelForSequenceClassification)
    assert torch.equal(logits(model, batch()), logits(_classifier(name), batch()))


@core
def test_a_classifier_trains_its_head_and_loads_it_back(name: str, kind: str, tmp_path) -> None:
    model = adapt(_classifier(name), moe_config(kind, task_type="SEQ_CLS")).train()
    model(**batch(), labels=LABELS).loss.backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in model.named_parameters() if p.grad is not None}
    assert any("score.modules_to_save" in n for n in trained)
    assert any("router" in n for n in trained)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.sub_(parameter.grad)
    expected = logits(model.eval(), batch())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(_classifier(name), str(tmp_path)).eval()
    assert torch.equal(logits(loaded, batch()), expected)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded, batch()), logits(_classifier(name), batch()))


def test_the_auto_class_loads_a_classifier(tmp_path) -> None:
    _classifier("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    model = adapt(base, moe_config("block", task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path / "adapter")
    folder = str(tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=CLASSES)
    assert torch.equal(logits(loaded.eval(), batch()), logits(model, batch()))


@core
def test_a_backbone_gives_the_features_of_the_whole_model(name: str, kind: str) -> None:
    backbone = tiny(name, auto=AutoModel)
    model = adapt(backbone, moe_config(kind, task_type="FEATURE_EXTRACTION"))
    assert isinstance(model, PeftModelForFeatureExtraction)
    inputs = batch()
    with collect_routing(model) as found, torch.no_grad():
        features = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].reshape(-1).bool()
    assert found
    assert all(torch.equal(r.token_mask, mask) for rs in found.values() for r in rs)
    whole = tiny(name)
    getattr(whole, whole.base_model_prefix).load_state_dict(tiny(name, auto=AutoModel).state_dict())
    adapted = adapt(whole, moe_config(kind))
    with torch.no_grad():
        expected = adapted(**inputs, output_hidden_states=True).hidden_states[-1]
    assert_close(features, expected)


@core
def test_an_adapter_without_a_task_type_loads_through_the_auto_class(name, kind, tmp_path) -> None:
    tiny(name, auto=AutoModel).save_pretrained(tmp_path / "base")
    base = AutoModel.from_pretrained(tmp_path / "base").eval()
    model = adapt(base, moe_config(kind, task_type=None))
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModel.from_pretrained(str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        expected = model(**batch()).last_hidden_state
        assert torch.equal(loaded(**batch()).last_hidden_state, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_classifier_trains(kind: str) -> None:
    base = tiny("llama", auto=AutoModelForTokenClassification, num_labels=CLASSES)
    # PEFT's "all-linear" leaves out the head of sequence classifiers only.
    targets = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    model = adapt(base, moe_config(kind, task_type="TOKEN_CLS", target_modules=targets)).train()
    assert isinstance(model, PeftModelForTokenClassification)
    labels = batch()["input_ids"].remainder(CLASSES)
    model(**batch(), labels=labels).loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert any("score.modules_to_save" in n for n in trained)
    assert all(p.grad is not None for p in trained.values())


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_can_be_embeddings(kind: str) -> None:
    model = adapt(tiny("llama"), moe_config(kind))
    inputs = batch()
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    given = {"inputs_embeds": embeddings, "attention_mask": inputs["attention_mask"]}
    assert torch.equal(logits(model, given), logits(model, inputs))
