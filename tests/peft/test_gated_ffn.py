"""A gated FFN computed as a whole: who is recognised, when it steps aside, that it is the same."""

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers import DynamicCache

import moeadapt
from moeadapt.tuner.gated_ffn import GatedFfn
from tests.tiny import MODELS, adapted, batch, labels_of, moe_config, tiny

GATED = ("llama", "qwen3", "mistral", "gemma")


def mlp_of(model: nn.Module) -> nn.Module:
    """Return the first FFN."""
    (path,) = [n for n, _ in model.named_modules() if n.endswith("layers.0.mlp")]
    return model.get_submodule(path)


def watch(model: nn.Module, monkeypatch) -> list[str]:
    """List the adapters of the FFNs that run as a whole."""
    ran, own = [], GatedFfn._forward
    monkeypatch.setattr(
        GatedFfn, "_forward", lambda self, name, x: ran.append(name) or own(self, name, x)
    )
    return ran


def step(model: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return loss and gradients."""
    inputs = batch(seed=seed)
    model.zero_grad()
    loss = model(**inputs, labels=labels_of(inputs)).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **grads}


def slots_form(model: nn.Module) -> nn.Module:
    """Make every FFN use its own forward: somebody looks at the slots."""
    for name, module in model.named_modules():
        if name.endswith("gate_proj"):
            module.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n_shared": 1},
        {"experts": {"name": "heterogeneous", "ranks": [1, 2, 5, 3]}},
        {"experts": "rank1", "router": {"name": "rank_wise", "k": 3}},
        {"router": {"name": "top_k", "k": 1}},
        {"router": {"name": "top_p", "p": 0.6}},
        {"router": {"name": "top_k", "k": 3, "null_experts": 2}},
        {"alpha_pattern": {"up_proj": 3.0}, "rank_pattern": {"down_proj": 2}},
        {"balance": {"switch": 0.3}, "use_rslora": True},
    ],
)
def test_a_whole_ffn_is_the_slots_in_value_and_every_gradient(name, fields, monkeypatch):
    whole = adapted(name, "ffn", **fields).double().train()
    slots = slots_form(adapted(name, "ffn", **fields).double()).train()
    for model in (whole, slots):
        moeadapt.set_aux_loss_scale(model, 1.0)
    ran = watch(whole, monkeypatch)
    found = step(whole)
    assert ran == ["default"] * 2  # two layers
    expected = step(slots)
    assert ran == ["default"] * 2
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert_close(found[key], value, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", sorted(set(MODELS) - set(GATED)))
def test_an_ffn_that_is_not_gated_keeps_its_forward(name):
    model = adapted(name, "ffn")
    assert not any(
        isinstance(getattr(vars(m).get("forward"), "__self__", None), GatedFfn)
        for m in model.modules()
    )


def test_an_ffn_of_another_computation_is_not_taken_for_a_gated_one():
    base = tiny("llama")

    class Other(type(base.model.layers[0].mlp)):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))

    base.model.layers[0].mlp.__class__ = Other
    model = get_peft_model(base, moe_config("ffn"))
    layers = model.base_model.model.model.layers
    assert "forward" not in vars(layers[0].mlp)
    assert "forward" in vars(layers[1].mlp)


@pytest.mark.parametrize(
    "change",
    ["disabled", "dropout", "hook", "sharded", "orthogonal-less", "decoding few tokens"],
)
def test_it_steps_aside_where_it_would_not_be_the_same(change, monkeypatch):
    fields = {"lora_dropout": 0.5} if change == "dropout" else {}
    if change == "orthogonal-less":
        fields = {"experts": "shared_a"}
    model = adapted("llama", "ffn", **fields).train()
    if change == "hook":
        slots_form(model)
    if change == "sharded":
        for module in model.modules():
            if isinstance(module, moeadapt.experts.base.Factor):
                module.register_forward_pre_hook(lambda *_: None)
    gate = mlp_of(model).gate_proj
    assert gate.runs_whole("default") == (change in ("disabled", "decoding few tokens"))
    ran = watch(model, monkeypatch)
    if change == "disabled":
        with model.disable_adapter():
            model(**batch())
    elif change == "decoding few tokens":
        with torch.no_grad():
            model(**batch(), use_cache=True, past_key_values=DynamicCache())
    else:
        model(**batch())
    assert ran == []


def test_with_dropout_set_but_not_in_training_it_runs_whole(monkeypatch):
    model = adapted("llama", "ffn", lora_dropout=0.5).eval()
    ran = watch(model, monkeypatch)
    model(**batch())
    assert ran == ["default"] * 2


def test_a_long_text_without_gradient_runs_whole_and_is_the_same(monkeypatch):
    inputs = batch(rows=8, length=24)
    with torch.no_grad():
        expected = slots_form(adapted("llama", "ffn"))(**inputs).logits
        model = adapted("llama", "ffn")
        ran = watch(model, monkeypatch)
        found = model(**inputs).logits
    assert ran == ["default"] * 2
    assert_close(found, expected)


def test_a_copy_runs_its_own_experts():
    model = adapted("llama", "ffn").train()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        mlp = mlp_of(other)
        assert mlp.forward.__self__.module is mlp
        before = step(model)["loss"]
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                if "moeadapt_lora_B" in name:
                    parameter.zero_()
        assert step(model)["loss"] == before
        assert step(other)["loss"] != before


def test_unloading_gives_the_ffn_its_own_forward_back():
    model = adapted("llama", "ffn").unload()
    assert all("forward" not in vars(m) for m in model.modules())


def test_two_adapters_take_turns(monkeypatch):
    model = adapted("llama", "ffn").train()
    model.add_adapter("other", moe_config("ffn", router={"name": "top_k", "k": 3}))
    ran = watch(model, monkeypatch)
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        step(model)
    assert ran == ["default"] * 2 + ["other"] * 2 + ["default"] * 2
    model.delete_adapter("other")
    step(model)


def test_autocast_computes_in_the_dtype_of_autocast():
    model = adapted("llama", "ffn").train()
    with torch.autocast("cpu", torch.bfloat16):
        found = step(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = step(slots_form(model))
    for key, value in expected.items():
        size = float(value.abs().max())
        assert_close(found[key], value, rtol=0.1, atol=0.05 * size + 1e-6)
