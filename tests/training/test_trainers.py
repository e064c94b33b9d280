"""Every trainer trains the routers and nothing of the base."""

import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from moeadapt import MoeAdaptCallback
from moeadapt.errors import ConfigError, TrainingError
from moeadapt.tuner.context import find_context
from tests.tiny import adapted
from tests.training.kit import NAMES, make_trainer, parameters, routers_of

METRICS = {
    f"moe/{name}"
    for name in (
        "aux_loss",
        "switch",
        "z_loss",
        "load_max",
        "load_min",
        "entropy",
        "active_experts",
        "dead_experts",
    )
}


PLAIN_LORA = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")


@pytest.mark.parametrize(
    ("name", "stock"), [*[(name, False) for name in NAMES], ("SFT", True), ("DPO", True)]
)
def test_training_moves_the_routers_and_leaves_the_base(
    name: str, stock: bool, tmp_path: Path
) -> None:
    callbacks = [MoeAdaptCallback()] if stock else []
    trainer = make_trainer(name, tmp_path, stock=stock, callbacks=callbacks)
    base = parameters(trainer.model, adapter=False)
    routers = {n: p.detach().clone() for n, p in routers_of(trainer.model).items()}

    assert math.isfinite(trainer.train().training_loss)

    for key, before in base.items():
        assert torch.equal(before, trainer.model.get_parameter(key).detach()), key
    for key, after in routers_of(trainer.model).items():
        assert not torch.equal(routers[key], after), key
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 4
    for log in logs:
        assert set(log) >= METRICS
        assert all(math.isfinite(log[key]) for key in METRICS)
        assert log["moe/active_experts"] == 2


def test_a_trainer_refuses_a_model_without_experts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="peft_config=MoeLoraConfig"):
        make_trainer("SFT", tmp_path, config=PLAIN_LORA)


def test_the_callback_refuses_a_model_without_experts(tmp_path: Path) -> None:
    callbacks = [MoeAdaptCallback()]
    trainer = make_trainer("SFT", tmp_path, stock=True, config=PLAIN_LORA, callbacks=callbacks)
    with pytest.raises(ConfigError, match="peft_config=MoeLoraConfig"):
        trainer.train()


def test_several_gpus_in_one_process_are_refused(tmp_path: Path) -> None:
    trainer = make_trainer("SFT", tmp_path)
    trainer.args._n_gpu = 2
    with pytest.raises(TrainingError, match="one process per GPU"):
        trainer.train()


def test_dpo_on_an_adapter_keeps_its_reference_copy(tmp_path: Path) -> None:
    model = adapted("llama", "block", balance={"switch": 0.1}).train()
    trainer = make_trainer("DPO", tmp_path, model=model, max_steps=2)
    assert "ref" in trainer.model.peft_config
    named = trainer.model.named_parameters
    reference = {n: p.detach().clone() for n, p in named() if ".ref." in n}
    trainer.train()
    assert reference
    assert all(torch.equal(p, reference[n]) for n, p in named() if n in reference)


@pytest.mark.parametrize("stock", [False, True])
def test_the_scale_is_withdrawn_after_training(stock: bool, tmp_path: Path) -> None:
    callbacks = [MoeAdaptCallback()] if stock else []
    trainer = make_trainer("SFT", tmp_path, stock=stock, callbacks=callbacks, max_steps=1)
    context = find_context(trainer.model)
    trainer.train()
    assert not context.scale_is_set
    assert float(context.scale(torch.device("cpu"))) == 1.0


def test_routers_get_their_own_learning_rate_and_decay(tmp_path: Path) -> None:
    options = {"router_learning_rate": 0.5, "router_weight_decay": 0.25}
    common = {"learning_rate": 0.125, "lr_scheduler_type": "constant", "max_steps": 2}
    trainer = make_trainer("SFT", tmp_path, trainer_fields=options, **common)
    trainer.train()
    routers = {id(p) for p in routers_of(trainer.model).values()}
    rates = {
        (id(p) in routers, group["lr"], group["weight_decay"])
        for group in trainer.optimizer.param_groups
        for p in group["params"]
    }
    assert rates == {(True, 0.5, 0.25), (False, 0.125, 0.0)}


def test_without_options_the_optimizer_is_the_stock_one(tmp_path: Path) -> None:
    groups = []
    for stock in (False, True):
        trainer = make_trainer("SFT", tmp_path, stock=stock)
        groups.append(
            [
                {**group, "params": [p.shape for p in group["params"]]}
                for group in trainer.create_optimizer().param_groups
            ]
        )
    assert groups[0] == groups[1]


def test_a_bad_router_option_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer("SFT", tmp_path, trainer_fields={"router_learning_rate": 0.0})
    with pytest.raises(ConfigError, match="router_learning_rate=0.0"):
        trainer.train()
