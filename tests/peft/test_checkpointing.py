"""Gradient checkpointing changes no gradient, auxiliary losses and padding included."""

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close

from moeadapt.tuner.inspect import pop_router_stats
from tests.tiny import CASES, adapted, batch, gradients

pytestmark = [
    pytest.mark.parametrize(("name", "kind"), CASES),
    pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"]),
]

BALANCE = {"switch": 0.5, "z_loss": 0.1}


def _model(name: str, kind: str, **overrides) -> PeftModel:
    model = adapted(name, kind, balance=BALANCE, **overrides).double().train()
    model.config.use_cache = False
    return model


def _checkpointed(name: str, kind: str, reentrant: bool, **overrides) -> PeftModel:
    model = _model(name, kind, **overrides)
    base = model.get_base_model()
    base.activation_checkpointing_enable({"use_reentrant": reentrant})
    base.enable_input_require_grads()
    return model


def test_checkpointing_gives_the_same_gradients(name: str, kind: str, reentrant: bool) -> None:
    plain = gradients(_model(name, kind), batch())
    again = gradients(_checkpointed(name, kind, reentrant), batch())
    assert plain.keys() == again.keys()
    for parameter in plain:
        assert_close(again[parameter], plain[parameter], msg=lambda m, p=parameter: f"{p}: {m}")


def test_checkpointing_counts_every_forward_once(name: str, kind: str, reentrant: bool) -> None:
    model = _checkpointed(name, kind, reentrant)
    gradients(model, batch())
    real = int(batch()["attention_mask"].sum())
    assert {s.tokens for s in pop_router_stats(model).values()} == {real}


def test_a_pass_without_grad_in_between_changes_nothing(
    name: str, kind: str, reentrant: bool
) -> None:
    plain = gradients(_model(name, kind), batch())
    model = _checkpointed(name, kind, reentrant)
    inputs, other = batch(), batch(rows=2, length=5, seed=1)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    loss = model(**inputs, labels=labels).loss
    with torch.no_grad():
        model(**other)
        with model.disable_adapter():
            model(**other)
    loss.backward()
    for parameter, expected in plain.items():
        assert_close(model.get_parameter(parameter).grad, expected)
