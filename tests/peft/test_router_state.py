"""What routers and losses keep besides parameters is saved, loaded and copied with the adapter."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch.testing import assert_close

from moeadapt.tuner.inspect import after_optimizer_step
from tests.tiny import KINDS, adapted, batch, labels_of, logits, tiny

STATEFUL = {
    "dynamic": {"router": {"name": "dynamic", "every": 1, "start": 3}},
    "loss_free": {"router": {"name": "sigmoid"}, "balance": {"loss_free": {"rate": 0.5}}},
    "l1_target": {"router": "relu", "balance": {"l1_sparsity": {"target": 0.25}}},
}

kinds = pytest.mark.parametrize("kind", KINDS)
states = pytest.mark.parametrize("fields", STATEFUL.values(), ids=STATEFUL)


def buffers(model):
    """Return every buffer of every router."""
    return {n: b.clone() for n, b in model.named_buffers() if "moeadapt_router" in n}


def after_a_step(kind, fields, accumulation=1):
    """Return a model after one optimizer step, and its buffers before."""
    model, inputs = adapted("llama", kind, **fields).train(), batch()
    before = buffers(model)
    for _ in range(accumulation):
        model(**inputs, labels=labels_of(inputs)).loss.backward()
    after_optimizer_step(model, lambda tensor: tensor)
    return model, before


@kinds
@states
def test_a_step_changes_what_gradients_do_not_train(kind, fields):
    model, before = after_a_step(kind, fields)
    after = buffers(model)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert not any(b.requires_grad for b in after.values())


@kinds
@states
def test_it_is_saved_and_loaded(kind, fields, tmp_path):
    model, _ = after_a_step(kind, fields)
    saved = get_peft_model_state_dict(model)
    assert {n.replace(".default", "") for n in buffers(model)} <= set(saved)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    assert buffers(again).keys() == buffers(model).keys()
    for name, value in buffers(again).items():
        assert torch.equal(value, buffers(model)[name])
    assert torch.equal(logits(again, batch()), logits(model.eval(), batch()))
    other = copy.deepcopy(model)
    for name, value in buffers(other).items():
        assert torch.equal(value, buffers(model)[name])


@kinds
def test_a_selection_bias_moves_by_the_load_of_exactly_one_step(kind):
    model, before = after_a_step(kind, STATEFUL["loss_free"], accumulation=3)
    first = buffers(model)
    for name, value in first.items():
        moved = value - before[name]
        assert set(moved.tolist()) <= {-0.5, 0.0, 0.5}
        assert moved.any()
    after_optimizer_step(model, lambda tensor: tensor)  # nothing was back-propagated since
    for name, value in buffers(model).items():
        assert torch.equal(value, first[name])


@kinds
def test_the_reduction_over_processes_decides_the_direction(kind):
    model, inputs = adapted("llama", kind, **STATEFUL["loss_free"]).train(), batch()
    model(**inputs, labels=labels_of(inputs)).loss.backward()
    twin = copy.deepcopy(model)
    model(**inputs, labels=labels_of(inputs)).loss.backward()
    twin(**inputs, labels=labels_of(inputs)).loss.backward()
    after_optimizer_step(model, lambda tensor: tensor)
    after_optimizer_step(twin, lambda tensor: -tensor)
    for name, value in buffers(model).items():
        assert_close(buffers(twin)[name], -value)


@kinds
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_unrouted_tokens_are_counted_once_per_backward(kind, reentrant):
    """Checkpointing forwards twice, and evaluation forwards without a backward."""
    fields = {"router": {"name": "dynamic", "every": 9, "init_std": 0.5}}
    model, inputs = adapted("llama", kind, **fields).train(), batch()
    for name, parameter in model.named_parameters():
        if name.endswith("threshold"):
            parameter.data.fill_(9.0)  # nobody takes any token
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if not reentrant:  # torch warns of a reentrant checkpoint without gradients
        with torch.no_grad():
            model(**inputs)
    model(**inputs, labels=labels_of(inputs)).loss.backward()
    after_optimizer_step(model, lambda tensor: tensor)
    found = {n: b for n, b in buffers(model).items() if n.endswith("unrouted")}
    plain = adapted("llama", kind, **fields).train()
    for name, parameter in plain.named_parameters():
        if name.endswith("threshold"):
            parameter.data.fill_(9.0)
    plain(**inputs, labels=labels_of(inputs)).loss.backward()
    after_optimizer_step(plain, lambda tensor: tensor)
    for name, value in found.items():
        assert value.any()
        assert_close(value, buffers(plain)[name])


def test_an_adapter_that_is_not_trained_is_left_alone():
    from tests.tiny import moe_config

    model = adapted("llama", "block", **STATEFUL["dynamic"])
    model.add_adapter("other", moe_config("block", **STATEFUL["loss_free"]))
    before = buffers(model)
    model.set_adapter("other")
    model.train()(**batch(), labels=labels_of(batch())).loss.backward()
    for _ in range(3):
        after_optimizer_step(model, lambda tensor: tensor)
    after = buffers(model)
    assert all(torch.equal(before[n], after[n]) for n in before if ".default." in n)
    assert any(not torch.equal(before[n], after[n]) for n in before if ".other." in n)
