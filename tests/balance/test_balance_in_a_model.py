"""What losses keep on a router: moved by a training step, saved, and loaded with the adapter."""

import pytest
import torch
from peft import PeftModel

from moeadapt.balance import BALANCE
from moeadapt.errors import ConfigError
from moeadapt.tuner.inspect import after_optimizer_step
from tests.tiny import KINDS, adapted, batch, gradients, tiny

EVERY = dict.fromkeys(sorted(BALANCE), 0.01)
OF_MATRICES = {"contrastive", "orthogonal"}
"""Losses that compare the matrices of LoRA experts, which small FFNs do not have."""
NULL = {"name": "top_k", "k": 2, "null_experts": 2, "init_std": 0.5}
STATES = {
    "selection_bias": {"router": "top_k", "balance": {"loss_free": {"rate": 0.125}}},
    "sparsity_coef": {
        "router": {"name": "relu", "init_std": 0.5},
        "balance": {"l1_sparsity": {"coef": 0.5, "target": 0.01, "alpha": 2.0}},
    },
}


def states(model, name):
    return {key: value for key, value in model.state_dict().items() if name in key}


def trained(model):
    """Count one backward pass, then do what follows an optimizer step."""
    model.train()
    gradients(model, batch())
    after_optimizer_step(model, lambda counts: counts)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STATES)
def test_an_adaptive_state_moves_and_comes_back_with_the_adapter(kind, name, tmp_path):
    model = adapted("llama", kind, **STATES[name])
    before = {key: value.clone() for key, value in states(model, name).items()}
    after = states(trained(model), name)
    assert before
    for key, value in after.items():
        assert value.dtype == torch.float32
        assert torch.isfinite(value).all()
        assert not torch.equal(value, before[key])
    model.save_pretrained(tmp_path)
    loaded = states(PeftModel.from_pretrained(tiny("llama"), tmp_path), name)
    assert loaded.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in loaded.items())


@pytest.mark.parametrize("kind", KINDS)
def test_every_loss_works_at_once_in_every_placement(kind):
    plain = gradients(adapted("llama", kind, router=NULL).train(), batch())
    left_out = OF_MATRICES if kind == "glu" else set()
    losses = {name: coef for name, coef in EVERY.items() if name not in left_out}
    model = adapted("llama", kind, router=NULL, balance=losses).train()
    found = gradients(model, batch())
    assert found.keys() == plain.keys()
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    assert any(not torch.equal(found[name], plain[name]) for name in plain)
    after_optimizer_step(model, lambda counts: counts)


@pytest.mark.parametrize("name", ["loss_free", "simbal", "null_rate"])
def test_a_model_refuses_a_loss_that_its_router_cannot_have(name):
    with pytest.raises(ConfigError, match=name):
        adapted("llama", "layer", router="uniform", balance={name: 0.01})
