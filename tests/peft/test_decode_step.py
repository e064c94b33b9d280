"""The short way of a decoding step: the same numbers, and not taken once something changes."""

import contextlib
import copy
import gc
import pickle
import weakref

import accelerate
import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.testing import assert_close

import moeadapt
from moeadapt.tuner.decode_step import BlockStep, LinearStep
from tests.peft.decode_changes import (
    CHANGES,
    hook_the_router,
    layer_of,
    routers_of,
    seen,
    use_gather,
)
from tests.structure.trace import recorded
from tests.tiny import adapted, batch, moe_config

SCOPES = ("layer", "block")
PROMPT, AT = 4, 7


@contextlib.contextmanager
def taken():
    """Count how often a linear takes the short way."""
    count, own = [], LinearStep.__call__

    def counted(step, layer, x):
        out = own(step, layer, x)
        count.extend([step] * (out is not None))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LinearStep, "__call__", counted)
        yield count


@contextlib.contextmanager
def usual_way():
    """Take the usual way always."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LinearStep, "__call__", lambda *_: None)
        patch.setattr(BlockStep, "enter", lambda *_: False)
        yield


def decode(model, inputs, change=None, around=contextlib.nullcontext):
    """Return the logits of decoding token by token; `change` the model in the middle."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    found = []
    with torch.no_grad():
        past = model(
            input_ids=ids[:, :PROMPT], attention_mask=mask[:, :PROMPT], use_cache=True
        ).past_key_values
        for at in range(PROMPT, ids.shape[1]):
            if at == AT and change is not None:
                change(model)
            with around() if at >= AT else contextlib.nullcontext():
                out = model(
                    input_ids=ids[:, at : at + 1],
                    attention_mask=mask[:, : at + 1],
                    past_key_values=past,
                    use_cache=True,
                )
            found.append(out.logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("router", ["top_k", {"name": "top_k", "k": 1}, "sigmoid", "top_p"])
@pytest.mark.parametrize("kind", SCOPES)
def test_it_gives_the_numbers_of_the_usual_way(kind, router):
    own = {"router": router, "n_shared": 1}
    model = adapted("llama", kind, **own).double()
    inputs = batch(rows=2, length=12)
    with usual_way():
        expected = decode(model, inputs)
    with taken() as steps:
        assert_close(decode(model, inputs), expected, rtol=1e-12, atol=1e-12)
    # Two layers of seven linears and eight tokens; the first run has prepared them.
    assert len(steps) == (8 * 14 if "top_k" in str(router) else 0)


@pytest.mark.parametrize("kind", SCOPES)
@pytest.mark.parametrize("adapters", [torch.bfloat16, torch.float32])
def test_it_is_taken_in_bfloat16_whatever_the_type_of_the_adapter(kind, adapters):
    model = adapted("llama", kind).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "moeadapt_lora" in name:
            parameter.data = parameter.data.to(adapters)
    inputs = batch(rows=1, length=12)
    with usual_way():
        expected = decode(model, inputs)
    with taken() as steps:
        assert_close(decode(model, inputs), expected, rtol=0.05, atol=0.05)
    assert len(steps) == 8 * 14


@pytest.mark.parametrize("kind", SCOPES)
def test_in_float16_an_expert_that_is_not_chosen_may_overflow(kind):
    model = adapted("llama", kind).to(torch.float16)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data[: parameter.shape[0] // 4] = 6e4
        elif "router" in name:
            parameter.data.zero_()
    for router in routers_of(model):  # nobody chooses expert 0
        router.bias = nn.Parameter(torch.tensor([-100.0, 0.0, 0.0, 0.0]))
    assert decode(model, batch(rows=1, length=9)).isfinite().all()


@pytest.mark.parametrize("kind", SCOPES)
def test_what_is_kept_elsewhere_is_not_read_from_here(kind):
    """Offloading leaves empty parameters and gives each module a forward that fetches them."""
    model, inputs = adapted("llama", kind), batch(rows=1, length=9)
    expected = decode(model, inputs)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert_close(decode(model, inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", SCOPES)
def test_a_deleted_adapter_and_a_replaced_base_are_let_go(kind):
    model, inputs = two_adapters(kind), batch(rows=1, length=9)
    decode(model, inputs)
    layer = layer_of(model)
    factor = weakref.ref(layer.moeadapt_lora_B["default"])
    model.set_adapter("other")
    model.delete_adapter("default")
    gc.collect()
    assert factor() is None
    decode(model, inputs)
    base = weakref.ref(layer.base_layer)
    layer.base_layer = copy.deepcopy(layer.base_layer)
    gc.collect()
    assert base() is None


@pytest.mark.parametrize("kind", SCOPES)
def test_equal_scores_go_to_the_lower_index(kind):
    model = adapted("llama", kind).double()
    for name, parameter in model.named_parameters():
        if "router" in name:
            parameter.data.zero_()
    inputs = batch(rows=1, length=12)
    with usual_way():
        expected = decode(model, inputs)
    assert_close(decode(model, inputs), expected, rtol=1e-12, atol=1e-12)


def two_adapters(kind: str) -> PeftModel:
    model = adapted("llama", kind).double()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model.add_adapter("other", moe_config(kind))
    return model.double().eval()


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("kind", SCOPES)
def test_a_change_in_the_middle_of_an_answer_is_followed(kind, change):
    model, inputs = two_adapters(kind), batch(rows=1, length=11)
    untouched = decode(model, inputs)
    twin = copy.deepcopy(model)
    with usual_way():
        expected = decode(twin, inputs, change)
    seen.clear()
    assert_close(decode(model, inputs, change), expected, rtol=1e-12, atol=1e-12)
    if change is hook_the_router:
        assert seen
    elif change is not use_gather:
        assert (expected - untouched).abs().max() > 1e-6


@pytest.mark.parametrize("kind", SCOPES)
def test_what_looks_into_the_routing_sees_every_token(kind):
    model, inputs = adapted("llama", kind).double(), batch(rows=1, length=11)
    with usual_way():
        expected = decode(model, inputs, around=lambda: moeadapt.override_routing(model, ban=[0]))
    found = decode(model, inputs, around=lambda: moeadapt.override_routing(model, ban=[0]))
    assert_close(found, expected, rtol=1e-12, atol=1e-12)
    with moeadapt.collect_routing(model) as routings:
        decode(model, inputs)
    assert {sum(len(r.weights) for r in rows) for rows in routings.values()} == {11}


def test_under_autocast_the_usual_way_is_taken():
    model, inputs = adapted("llama", "block"), batch(rows=1, length=11)
    decode(model, inputs)
    with taken() as steps, torch.autocast("cpu", torch.bfloat16):
        decode(model, inputs)
    assert not steps


def test_a_batch_of_another_size_and_a_copy_take_no_step_of_the_old_one():
    model = adapted("llama", "block").double()
    decode(model, batch(rows=1, length=9))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        with usual_way():
            expected = decode(other, batch(rows=3, length=11))
        with taken() as steps:
            found = decode(other, batch(rows=3, length=11))
        assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert steps


@pytest.mark.parametrize(("kind", "most"), [("layer", 11), ("block", 5)])
def test_a_token_takes_few_kernels(kind, most):
    """Over those of the base, per linear: two products, and what the router takes."""
    model, inputs = adapted("llama", kind), batch(rows=1, length=12)
    for _ in range(2):
        with recorded() as ours:
            decode(model, inputs)
    with recorded() as base, model.disable_adapter():
        decode(model, inputs)
    with usual_way(), recorded() as usual:
        decode(model, inputs)
    prompt = (len(usual) - len(base)) / 9
    assert (len(ours) - len(base) - prompt) / (8 * 14) < most
    assert len(ours) < len(usual)
