"""Settings that meet in one adapter: each keeps its meaning beside the others."""

import copy

import pytest
import torch

import moeadapt
from moeadapt import MoeLoraConfig
from moeadapt.errors import ConfigError, TrainingError, UnsupportedError
from tests.tiny import adapted, batch, labels_of, logits


@pytest.mark.parametrize(
    "schedule", [{"gate_dropout": 0.1}, {"temperature": {"start": 2.0, "steps": 3}}]
)
def test_a_schedule_leaves_the_k_of_fine_experts_alone(schedule):
    fields = {"granularity": 2, "router": {"name": "top_k", "k": 2}}
    model = adapted("llama", "block", **fields, schedule=schedule)
    plain = adapted("llama", "block", **fields)
    assert torch.equal(logits(model, batch()), logits(plain, batch()))
    with moeadapt.collect_routing(model) as routings, torch.no_grad():
        model(**batch())
    for (routing,) in routings.values():
        assert ((routing.weights != 0).sum(-1) == 4).all()


def test_a_number_for_loss_free_is_its_rate_also_over_a_preset():
    config = MoeLoraConfig.preset("deepseek", balance={"loss_free": 0.01})
    assert config.balance["loss_free"]["rate"] == 0.01
    assert (
        MoeLoraConfig(router="sigmoid", balance={"loss_free": 0.01}).balance["loss_free"]["rate"]
        == 0.01
    )


@pytest.mark.parametrize(
    "schedule", [{"k": {"start": 4, "end": 2, "steps": 5}}, {"k_inference": 2}]
)
def test_switch_keeps_its_one_expert(schedule):
    with pytest.raises(ConfigError, match="'switch' has nothing that k.* could change"):
        MoeLoraConfig(router="switch", schedule=schedule)


def test_a_k_schedule_survives_json():
    config = MoeLoraConfig(router="top_k", schedule={"k": {"start": 4, "end": 2, "steps": 5}})
    plain = config.to_dict()
    plain.pop("peft_type")
    again = MoeLoraConfig(**plain)
    assert again.router == config.router
    assert again.router_config.normalize == "renorm"


@pytest.mark.parametrize("loss", ["contrastive", {"orthogonal": {"form": "outputs"}}])
def test_a_loss_over_features_needs_experts_that_see_what_is_routed(loss):
    balance = loss if isinstance(loss, dict) else {loss: 0.1}
    with pytest.raises(ConfigError, match=r"compares what experts make.*gate_proj"):
        adapted("llama", "block", target_modules=["down_proj"], balance=balance)
    model = adapted("llama", "layer", target_modules=["down_proj"], balance=balance).train()
    model(**batch(), labels=labels_of(batch())).loss.backward()


def test_a_copy_of_a_model_is_not_attached_to_the_optimizer_of_the_original():
    model = adapted("llama", "block", schedule={"freeze_router_steps": 2})
    moeadapt.attach_optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    moeadapt.step_schedule(model, 0)
    with pytest.raises(TrainingError, match="attach_optimizer"):
        moeadapt.step_schedule(copy.deepcopy(model), 1)


def test_a_rate_of_its_own_is_refused_before_the_first_step():
    model = adapted("llama", "block")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.raises(ConfigError, match="router_learning_rate=0.1 follows"):
        moeadapt.attach_optimizer(model, optimizer, router_learning_rate=0.1)


def test_kmeans_starts_the_active_adapter_only():
    from tests.tiny import moe_config

    model = adapted("llama", "block")
    model.add_adapter("other", moe_config("block"))
    before = {n: p.clone() for n, p in model.named_parameters() if "moeadapt_router" in n}
    moeadapt.init_routers_kmeans(model, [batch()])
    changed = {n for n, p in model.named_parameters() if n in before and (p != before[n]).any()}
    assert changed == {n for n in before if ".default." in n}


def test_kmeans_leaves_the_values_of_training_in_use():
    model = adapted("llama", "block", schedule={"temperature": {"start": 4.0, "steps": 3}}).train()
    moeadapt.step_schedule(model, 0)
    moeadapt.init_routers_kmeans(model, [batch()])
    heads = moeadapt.tuner.inspect.heads_of(model)
    assert {head.router.temperature for head in heads.values()} == {4.0}


@pytest.mark.parametrize("field", ["experts_pattern", "rank_pattern", "alpha_pattern"])
def test_a_bad_pattern_is_refused_by_name(field):
    with pytest.raises(ConfigError, match=rf"{field}: '\(' is not a valid regular expression"):
        MoeLoraConfig(**{field: {"(": 2}})


def test_a_pattern_for_experts_that_matches_nothing_is_refused():
    with pytest.raises(ConfigError, match="experts_pattern: 'q_prj' matches none of the 14"):
        adapted("llama", "layer", experts_pattern={"q_prj": 2})
    model = adapted("llama", "layer", experts_pattern={"q_proj": 2})
    heads = moeadapt.tuner.inspect.heads_of(model)
    assert {h.router.num_experts for n, h in heads.items() if "q_proj" in n} == {2}


def test_a_field_that_no_preset_has_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="no field 'routr'.*router"):
        MoeLoraConfig.preset("mixlora", routr=1)


def test_a_head_that_sees_one_token_cannot_decide_for_a_sequence():
    router = {"name": "top_k", "per": "sequence"}
    model = adapted("llama", "layer", router=router, target_modules=["q_proj", "lm_head"])
    with pytest.raises(UnsupportedError, match="lm_head.*exclude_modules"):
        model.generate(**batch(), max_new_tokens=1)


def test_equal_inputs_make_no_clusters():
    model = adapted("llama", "layer", target_modules=["q_proj"], layers_to_transform=[0])
    inputs = {"input_ids": torch.full((2, 6), 7)}
    with pytest.raises(ConfigError, match="fewer distinct directions"):
        moeadapt.init_routers_kmeans(model, [inputs])


def test_one_folder_is_not_a_list_of_folders(tmp_path):
    model = adapted("llama", "layer", target_modules=["q_proj"])
    with pytest.raises(ConfigError, match="give a list, one per expert"):
        moeadapt.init_from_adapters(model, str(tmp_path))


def test_decoding_with_gradients_keeps_the_decision_of_the_prompt():
    model = adapted("llama", "block", router={"name": "soft", "per": "sequence", "init_std": 0.5})
    token = torch.full((3, 1), 7)
    with moeadapt.collect_routing(model) as routings:
        cache = model(**batch(), use_cache=True).past_key_values
        model(input_ids=token, past_key_values=cache)
    for prompt, step in routings.values():
        assert torch.equal(step.weights, prompt.weights.view(3, -1, 4)[:, -1])
