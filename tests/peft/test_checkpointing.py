"""Gradient checkpointing changes no gradient, auxiliary losses and padding included."""

from functools import cache

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.testing import assert_close

from moeadapt.tuner.inspect import pop_router_stats
from tests.tiny import CASES, KINDS, adapted, batch, gradients, labels_of

modes = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])

BALANCE = {"switch": 0.5, "z_loss": 0.1}


def _model(name: str, kind: str, reentrant: bool | None = None, **overrides) -> PeftModel:
    model = adapted(name, kind, **{"balance": BALANCE, **overrides}).double().train()
    model.config.use_cache = False
    if reentrant is not None:
        base = model.get_base_model()
        base.activation_checkpointing_enable({"use_reentrant": reentrant})
        base.enable_input_require_grads()
    return model


@cache
def _plain_gradients(name: str, kind: str) -> dict[str, Tensor]:
    return gradients(_model(name, kind), batch())


def _assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert_close(found[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")


@modes
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_checkpointing_gives_the_same_gradients_and_counts_once(
    name: str, kind: str, reentrant: bool
) -> None:
    model = _model(name, kind, reentrant)
    _assert_equal(gradients(model, batch()), _plain_gradients(name, kind))
    real = int(batch()["attention_mask"].sum())
    assert {s.tokens for s in pop_router_stats(model).values()} == {real}


@pytest.mark.parametrize("kind", KINDS)
def test_the_auxiliary_losses_are_part_of_those_gradients(kind: str) -> None:
    without = gradients(_model("llama", kind, balance=None), batch())
    routers = [name for name in without if "router" in name]
    assert routers
    for name in routers:
        assert not torch.allclose(without[name], _plain_gradients("llama", kind)[name])


# torch says so for every checkpointed forward that runs without grad.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@modes
@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_without_grad_in_between_changes_nothing(kind: str, reentrant: bool) -> None:
    model = _model("llama", kind, reentrant)
    inputs, other = batch(), batch(rows=2, length=5, seed=1)
    loss = model(**inputs, labels=labels_of(inputs)).loss
    with torch.no_grad():
        model(**other)
        with model.disable_adapter():
            model(**other)
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    _assert_equal(found, _plain_gradients("llama", kind))


@modes
@pytest.mark.parametrize("noise", ["gaussian", "softplus"])
def test_the_recomputed_forward_redraws_the_same_noise(noise: str, reentrant: bool) -> None:
    router = {"name": "top_k", "k": 2, "noise": noise}
    found = []
    for mode in (None, reentrant):
        model = _model("llama", "layer", mode, router=router)
        torch.manual_seed(11)
        found.append(gradients(model, batch()))
    _assert_equal(found[1], found[0])
