"""Copies of a model: deepcopy, pickle, torch.save, unload and wrap again."""

import copy
import io
import pickle

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from moeadapt import collect_routing, set_aux_loss_scale
from moeadapt.tuner.context import find_context
from moeadapt.tuner.inspect import pop_router_stats
from tests.tiny import CASES, KINDS, adapt, adapted, batch, gradients, logits, moe_config, tiny


def _hook_owners(model: nn.Module) -> set[int]:
    hooks = [
        hook
        for module in model.modules()
        for registry in (module._forward_pre_hooks, module._forward_hooks)
        for hook in registry.values()
    ]
    return {id(hook.__self__) for hook in hooks if hasattr(hook, "__self__")}


def _through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _through_torch(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


WAYS = {"deepcopy": copy.deepcopy, "pickle": _through_pickle, "torch.save": _through_torch}
ways = pytest.mark.parametrize("way", list(WAYS.values()), ids=list(WAYS))


@ways
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_copy_computes_the_same_and_shares_nothing(name: str, kind: str, way) -> None:
    model = adapted(name, kind)
    expected = logits(model, batch())
    twin = way(model)
    assert torch.equal(logits(twin, batch()), expected)
    assert not _hook_owners(twin) & _hook_owners(model)
    assert not {p.data_ptr() for p in twin.parameters()} & {
        p.data_ptr() for p in model.parameters()
    }
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(twin, batch()), expected)


@ways
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_has_its_own_context_shared_by_its_own_layers(kind: str, way) -> None:
    model = adapted("llama", kind, balance={"switch": 0.1}).train()
    set_aux_loss_scale(model, 0.25)
    gradients(model, batch())
    twin = way(model)
    assert find_context(twin) is not find_context(model)
    layers = [m for m in twin.modules() if isinstance(m, BaseTunerLayer)]
    assert all(layer._context is find_context(twin) for layer in layers)
    own = {id(layer) for layer in layers}
    for block in find_context(twin).blocks.values():
        assert all(id(owner) in own for owner in block.owners.values())
    assert pop_router_stats(twin) == {}
    assert len(pop_router_stats(model)) > 0
    with collect_routing(model) as of_the_original:
        copied_meanwhile = way(model)
        logits(copied_meanwhile, batch())
    assert not of_the_original
    assert find_context(copied_meanwhile).collected is None
    with collect_routing(model) as of_the_original, collect_routing(twin) as of_the_twin:
        logits(twin, batch())
    assert of_the_twin
    assert not of_the_original


@ways
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_trains_and_keeps_the_aux_scale(kind: str, way) -> None:
    model = adapted("llama", kind, balance={"switch": 0.5}).double().train()
    set_aux_loss_scale(model, 0.25)
    twin = way(model)
    expected, found = gradients(model, batch()), gradients(twin, batch())
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_taken_inside_a_forward_starts_between_forwards(kind: str) -> None:
    model = adapted("llama", kind)
    twins = []
    handle = model.get_base_model().model.norm.register_forward_hook(
        lambda *_: twins.append(copy.deepcopy(model)) if not twins else None
    )
    expected = logits(model, batch())
    handle.remove()
    (twin,) = twins
    assert find_context(twin).frame is None
    assert torch.equal(logits(twin, batch()), expected)


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", KINDS)
def test_an_unloaded_model_can_be_wrapped_again(first: str, second: str) -> None:
    plain = adapted("llama", first).unload()
    again = adapt(plain, moe_config(second), seed=7)
    fresh = adapt(tiny("llama"), moe_config(second), seed=7)
    assert torch.equal(logits(again, batch()), logits(fresh, batch()))


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_can_take_another_adapter(kind: str) -> None:
    model = adapted("llama", kind)
    twin: PeftModel = copy.deepcopy(model)
    twin.add_adapter("other", moe_config(kind, num_experts=2))
    twin.set_adapter("other")
    assert list(model.peft_config) == ["default"]
    assert not torch.equal(logits(twin, batch()), logits(model, batch()))
    twin.set_adapter("default")
    assert torch.equal(logits(twin, batch()), logits(model, batch()))
