"""Several adapters on one model: set, delete, train, disable, copy."""

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor
from torch.testing import assert_close

from moeadapt import collect_routing
from moeadapt.errors import UnsupportedError
from moeadapt.routers import Router
from moeadapt.tuner import MoeLoraLinear
from moeadapt.tuner.context import find_context
from tests.tiny import KINDS, adapt, adapted, batch, gradients, logits, moe_config, tiny

OTHERS: dict[str, dict[str, Any]] = {
    "more experts": {"num_experts": 6, "r": 2},
    "fewer targets": {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "another layer": {
        "target_modules": ["gate_proj", "up_proj", "down_proj"],
        "layers_to_transform": 1,
    },
    "another router": {"router": "uniform", "n_shared": 1},
}


def _alone(model: PeftModel, adapter: str, kind: str, **fields: Any) -> Tensor:
    """Logits of a new model that has nothing but a copy of `adapter`."""
    alone = adapt(tiny("llama"), moe_config(kind, **fields))
    set_peft_model_state_dict(alone, get_peft_model_state_dict(model, adapter_name=adapter))
    return logits(alone, batch())


@pytest.mark.parametrize("fields", list(OTHERS.values()), ids=list(OTHERS))
@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", KINDS)
def test_adapters_of_any_two_kinds_live_side_by_side(
    first: str, second: str, fields: dict[str, Any]
) -> None:
    model = adapted("llama", first)
    before = logits(model, batch())
    model.add_adapter("other", moe_config(second, **fields))
    assert torch.equal(logits(model, batch()), before)
    model.set_adapter("other")
    assert torch.equal(logits(model, batch()), _alone(model, "other", second, **fields))
    model.set_adapter("default")
    assert torch.equal(logits(model, batch()), before)
    model.set_adapter("other")
    model.delete_adapter("default")
    assert torch.equal(logits(model, batch()), _alone(model, "other", second, **fields))


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_can_be_deleted_and_used_again(kind: str) -> None:
    model = adapted("llama", kind)
    model.add_adapter("other", moe_config(kind))
    model.set_adapter("other")
    model.delete_adapter("default")
    model.add_adapter("default", moe_config(kind, num_experts=2))
    model.set_adapter("default")
    expected = _alone(model, "default", kind, num_experts=2)
    assert torch.equal(logits(model, batch()), expected)
    assert set(find_context(model).heads) == {"default", "other"}


@pytest.mark.parametrize("kind", KINDS)
def test_deleting_forgets_routers_blocks_and_banks(kind: str) -> None:
    model = adapted("llama", kind)
    model.add_adapter("other", moe_config(kind))
    model.set_adapter("other")
    model.delete_adapter("default")
    context = find_context(model)
    assert set(context.heads) == {"other"}
    assert {name for block in context.blocks.values() for name in block.owners} <= {"other"}
    for layer in model.modules():
        if isinstance(layer, MoeLoraLinear):
            assert set(layer.moe_banks) == set(layer.moe_plans) == {"other"}


def test_deleting_the_active_adapter_activates_another() -> None:
    model = adapted("llama", "block")
    model.add_adapter("other", moe_config("block", num_experts=2))
    with pytest.warns(UserWarning, match="was active which is now deleted"):
        model.delete_adapter("default")
    expected = _alone(model, "other", "block", num_experts=2)
    assert torch.equal(logits(model, batch()), expected)


@pytest.mark.parametrize("kinds", [("layer", "layer"), ("layer", "block"), ("block", "block")])
def test_two_active_linear_adapters_add_up(kinds: tuple[str, str]) -> None:
    model = adapted("llama", kinds[0], target_modules=["lm_head"]).double()
    model.add_adapter("other", moe_config(kinds[1], target_modules=["lm_head"], num_experts=3))
    model.double()
    outputs = {}
    for active in ("default", "other", ["default", "other"]):
        model.base_model.set_adapter(active)
        outputs[str(active)] = logits(model, batch())
    base = logits(tiny("llama").double(), batch())
    deltas = (outputs["default"] - base) + (outputs["other"] - base)
    assert_close(outputs["['default', 'other']"], base + deltas)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_ffn_experts_do_not_add_up_with_others(kind: str) -> None:
    model = adapted("llama", "ffn")
    model.add_adapter("other", moe_config(kind))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(UnsupportedError, match="activate one with set_adapter"):
        logits(model, batch())
    model.set_adapter("default")
    assert torch.equal(logits(model, batch()), logits(adapted("llama", "ffn"), batch()))


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_active_adapter_trains(kind: str) -> None:
    model = adapted("llama", kind)
    model.add_adapter("other", moe_config(kind))
    for active, idle in (("default", "other"), ("other", "default")):
        model.set_adapter(active)
        found = gradients(model.train(), batch())
        assert all(f".{active}." in n for n in found)
        assert not any(p.requires_grad for n, p in model.named_parameters() if f".{idle}." in n)
        assert any("router" in n for n in found)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_active_adapter_routes(kind: str) -> None:
    model = adapted("llama", kind)
    model.add_adapter("other", moe_config(kind, num_experts=3))
    for active, experts in (("default", 4), ("other", 3)):
        model.set_adapter(active)
        with collect_routing(model) as routings:
            logits(model, batch())
        assert {len(found) for found in routings.values()} == {1}
        assert {r.num_experts for found in routings.values() for r in found} == {experts}
    with collect_routing(model) as routings, model.disable_adapter():
        logits(model, batch())
    assert routings == {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_router_stays_frozen(kind: str) -> None:
    model = adapted("llama", kind, router={"name": "random", "k": 2})
    model.add_adapter("other", moe_config(kind))
    steps = [
        lambda: None,
        lambda: model.set_adapter("default"),
        lambda: model.base_model.set_requires_grad("default"),
        lambda: model.set_requires_grad("default"),
    ]
    for step in steps:
        step()
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained
        assert not [n for n in trained if "router.default" in n]


@pytest.mark.parametrize("kind", KINDS)
def test_trls_reference_copy_computes_the_same(kind: str) -> None:
    """TRL makes its reference adapter by renaming parameters, `.default.` to `.ref.`."""
    model = adapted("llama", kind)
    model.add_adapter("ref", model.peft_config["default"])
    expected = logits(model, batch())
    for name, parameter in model.named_parameters():
        if ".default." in name:
            copy = model.get_parameter(name.replace(".default.", ".ref."))
            copy.data.copy_(parameter.data)
    model.set_adapter("ref")
    assert torch.equal(logits(model, batch()), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_lora_plus_gives_b_its_own_learning_rate(kind: str) -> None:
    model = adapted("llama", kind)
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16)
    names = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
    faster = {names[id(p)] for g in optimizer.param_groups if g["lr"] > 1e-4 for p in g["params"]}
    assert faster == {n for n in names.values() if "lora_B" in n}
    seen = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(seen) == sorted(names)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_loaded_for_inference_is_frozen_and_for_training_is_not(kind, save_case) -> None:
    saved = save_case("llama", kind)
    frozen = PeftModel.from_pretrained(saved.base(), saved.adapter_dir)
    assert not any(p.requires_grad for p in frozen.parameters())
    trained = PeftModel.from_pretrained(saved.base(), saved.adapter_dir, is_trainable=True)
    found = gradients(trained.train(), batch())
    assert {n for n, p in trained.named_parameters() if p.requires_grad} == set(found)
    assert len([m for m in trained.modules() if isinstance(m, Router)]) > 0


def test_a_forward_that_failed_leaves_no_routing_behind() -> None:
    model = adapted("llama", "block")
    with pytest.raises(RuntimeError, match="on purpose"):
        handle = model.get_base_model().model.layers[0].mlp.act_fn.register_forward_hook(_fail)
        logits(model, batch())
    handle.remove()
    assert not any(block._routings for block in find_context(model).blocks.values())
    assert torch.equal(logits(model, batch()), logits(adapted("llama", "block"), batch()))


def _fail(*_: Any) -> None:
    raise RuntimeError("on purpose")
