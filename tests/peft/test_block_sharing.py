"""Linears of one block that share the reading of its input: the same result as each for itself."""

import pytest
import torch
from torch.testing import assert_close

import moeadapt
from moeadapt.tuner.block_routing import BlockRouting
from tests.tiny import MODELS, adapted, batch, labels_of

SHARED = {"llama": 5, "qwen3": 5, "mistral": 5, "gemma": 5, "opt": 3, "gpt2": 0}
"""Linears per layer that read a block's input with another one."""


def step(model) -> dict[str, torch.Tensor]:
    """Return loss and gradients."""
    model.zero_grad()
    inputs = batch()
    loss = model(**inputs, labels=labels_of(inputs)).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def count_shared(monkeypatch) -> list[int]:
    """List how many linears each common projection served."""
    served, own = [], BlockRouting._project

    def project(self, x, banks):
        parts = own(self, x, banks)
        served.append(len(parts))
        return parts

    monkeypatch.setattr(BlockRouting, "_project", project)
    return served


def alone(monkeypatch) -> None:
    """Make every linear read for itself."""
    monkeypatch.setattr(BlockRouting, "_project", lambda self, x, banks: {})


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["block", "ffn"])
def test_sharing_changes_no_value_and_no_gradient(name, kind, monkeypatch):
    model = adapted(name, kind, balance={"switch": 0.3}).double().train()
    moeadapt.set_aux_loss_scale(model, 1.0)
    served = count_shared(monkeypatch)
    found = step(model)
    if kind == "block":
        assert sum(served) == 2 * SHARED[name]
    alone(monkeypatch)
    expected = step(model)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert_close(found[key], value, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "fields",
    [
        {"experts": "shared_a"},
        {"experts": "shared_b"},
        {"experts": {"name": "lora", "orthogonalize": True}},
        {"experts": {"name": "heterogeneous", "ranks": [1, 2, 5, 3]}},
        {"experts": {"name": "random_a", "k": 5}},
        {"rank_pattern": {"k_proj": 3}, "alpha_pattern": {"v_proj": 3.0}},
        {"n_shared": 2},
        {"impl": "grouped"},
    ],
)
def test_experts_that_are_gated_apart_are_still_read_together(fields, monkeypatch):
    model = adapted("llama", "block", **fields).double().train()
    found = step(model)
    alone(monkeypatch)
    expected = step(model)
    for key, value in expected.items():
        assert_close(found[key], value, rtol=1e-9, atol=1e-11)


def test_two_adapters_at_once_share_each_for_itself(monkeypatch):
    model = adapted("llama", "block").double()
    model.add_adapter("other", model.peft_config["default"])
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    model.base_model.set_adapter(["default", "other"])
    model.train()
    found = step(model)
    alone(monkeypatch)
    expected = step(model)
    for key, value in expected.items():
        assert_close(found[key], value, rtol=1e-9, atol=1e-11)


def test_a_linear_that_is_called_with_something_else_reads_that(monkeypatch):
    model = adapted("llama", "block").double()
    attention = model.base_model.model.model.layers[0].self_attn
    expected = step(model)["loss"]
    attention.k_proj.register_forward_pre_hook(lambda module, args: (args[0] * 1.0,))
    assert_close(step(model)["loss"], expected)
    attention.k_proj.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    changed = step(model)["loss"]
    assert changed != expected
    alone(monkeypatch)
    assert_close(step(model)["loss"], changed)


def test_sharded_matrices_are_left_to_their_own_module(monkeypatch):
    model = adapted("llama", "block").train()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.moe_banks["default"].factor("lora_A").register_forward_pre_hook(lambda *_: None)
    served = count_shared(monkeypatch)
    step(model)
    assert sorted(served) == [2, 2, 2, 3]  # k and v, then q with them in the other layer


def test_an_adapter_that_is_off_in_one_linear_is_not_computed_there(monkeypatch):
    model = adapted("llama", "block").train()
    layer = model.base_model.model.model.layers[0].self_attn.k_proj
    layer.enable_adapters(False)
    served = count_shared(monkeypatch)
    step(model)
    assert sorted(served) == [2, 2, 2, 3]
