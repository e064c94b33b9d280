"""Cases 52 to 57, 81: NaN, infinity, batches without labels or tokens, memory."""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from moeadapt import MoeAdaptCallback, collect_routing
from moeadapt.errors import ConfigError, TrainingError
from moeadapt.training import find_checkpoint
from tests.faults.training.kit import (
    DRIFTING,
    At,
    adapter,
    assert_same,
    bad_loss,
    hidden,
    moe,
    names,
    poison,
    run,
)
from tests.tiny import adapt, moe_config, tiny
from tests.training.kit import GradientProbe
from tests.training.worker import MoETrainer, collate, make


class BeforeStep:
    """Keeps the adapter as it was after the last finished step."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.weights = adapter(trainer)

    def __call__(self, **kwargs: Any) -> None:
        self.weights = adapter(self.trainer)


def test_fault_052_a_nan_hidden_state_is_named_by_its_router(tmp_path: Path) -> None:
    def strike(model: Any, **kwargs: Any) -> None:
        poison(model, "layers.1.post_attention_layernorm")

    for check, fields in ((True, {"check_routers": True}), (False, {})):
        trainer = run(tmp_path / str(check), callbacks=[At("on_step_begin", 3, strike)])
        trainer._check_routers = bool(fields)
        with pytest.raises(
            TrainingError, match=r"router 'default/.*layers\.1\.mlp'.*hidden states"
        ):
            trainer.train()
        assert find_checkpoint(tmp_path / str(check)).endswith("checkpoint-2")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_fault_053_a_loss_that_is_not_finite_stops_the_run(value: float, tmp_path: Path) -> None:
    trainer = run(tmp_path)
    before = BeforeStep(trainer)
    trainer.add_callback(At("on_save", 2, before))
    with (
        bad_loss(trainer, 3, value),
        pytest.raises(TrainingError, match=rf"loss is {value}.*step 3.*checkpoint-2"),
    ):
        trainer.train()
    logged = [log["nonfinite_loss"] for log in trainer.state.log_history if "nonfinite_loss" in log]
    assert len(logged) == 1
    assert logged[0] == value or (math.isnan(value) and math.isnan(logged[0]))
    assert_same(adapter(trainer), before.weights)
    assert [n for n in names(tmp_path) if n.startswith("checkpoint")] == [
        "checkpoint-1",
        "checkpoint-2",
    ]
    resumed = run(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    assert all(torch.isfinite(p).all() for p in adapter(resumed).values())


@pytest.mark.parametrize("filtered", [True, False])
def test_fault_053_a_step_can_be_skipped_instead(filtered: bool, tmp_path: Path) -> None:
    fields = {"on_nonfinite": "skip"}
    config = moe(**DRIFTING)
    trainer = run(tmp_path, fields=fields, config=config, logging_nan_inf_filter=filtered)
    seen = {1: BeforeStep(trainer), 2: BeforeStep(trainer)}
    for step, one in seen.items():
        trainer.add_callback(At("on_step_end", step, one))
    with bad_loss(trainer, 2, math.nan), pytest.warns(UserWarning, match="step 2.* is skipped"):
        trainer.train()
    assert_same(seen[2].weights, seen[1].weights)
    logs = trainer.state.log_history
    assert math.isnan(next(log["nonfinite_loss"] for log in logs if "nonfinite_loss" in log))
    assert all(math.isfinite(log["loss"]) for log in logs if "loss" in log)
    assert all(math.isfinite(v) for log in logs for k, v in log.items() if k.startswith("moe/"))
    assert trainer.state.global_step == 5


def test_fault_053_skipping_for_ever_stops(tmp_path: Path) -> None:
    trainer = run(tmp_path, fields={"on_nonfinite": "skip"}, max_steps=20, saves=False)
    poison(trainer.model, "layers.1.post_attention_layernorm")
    with (
        pytest.warns(UserWarning, match="is skipped"),
        pytest.raises(TrainingError, match="number 11 in a row"),
    ):
        trainer.train()


def test_fault_053_nan_weights_are_not_saved(tmp_path: Path) -> None:
    strike = At("on_step_end", 2, lambda model, **_: poison(model, "lora_B"))
    trainer = run(tmp_path, callbacks=[strike])
    with pytest.raises(TrainingError, match=r"checkpoint-2 is not saved: .*lora_B.*not finite"):
        trainer.train()
    assert find_checkpoint(tmp_path).endswith("checkpoint-1")
    with pytest.raises(TrainingError, match="is not saved"):
        trainer.save_model()


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_fault_053_the_callback_does_it_for_a_stock_trainer(policy: str, tmp_path: Path) -> None:
    callback = MoeAdaptCallback(on_nonfinite=policy)
    trainer = run(tmp_path, stock=True, callbacks=[callback])
    with bad_loss(trainer, 3, math.nan):
        if policy == "stop":
            with pytest.raises(TrainingError, match=r"grad_norm is nan in optimizer step 3"):
                trainer.train()
            assert find_checkpoint(tmp_path).endswith("checkpoint-2")
        else:
            with pytest.warns(UserWarning, match="is skipped"):
                trainer.train()
    assert all(torch.isfinite(p).all() for p in adapter(trainer).values())


def test_fault_053_an_unknown_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"on_nonfinite='stpo'.*did you mean 'stop'"):
        run(tmp_path, fields={"on_nonfinite": "stpo"})


@pytest.mark.parametrize("stock", [False, True])
def test_fault_054_a_step_that_the_scaler_skips_counts_for_nothing(
    stock: bool, tmp_path: Path
) -> None:
    callback = MoeAdaptCallback()
    trainer = run(
        tmp_path,
        stock=stock,
        callbacks=[callback] if stock else [],
        max_grad_norm=0.0,
        config=moe(**DRIFTING),
    )
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def overflow(model: Any, **kwargs: Any) -> None:
        next(p for p in model.parameters() if p.grad is not None).grad.fill_(math.inf)

    trainer.add_callback(At("on_pre_optimizer_step", 1, overflow))
    if stock:
        trainer.args.fp16 = True
    temperatures, biases = [], []

    def look(model: Any, **kwargs: Any) -> None:
        router = next(m for n, m in model.named_modules() if n.endswith("moeadapt_router.default"))
        temperatures.append(router.temperature)
        biases.append(router.selection_bias.detach().clone())

    trainer.add_callback(At("on_optimizer_step", 1, look))
    trainer.add_callback(At("on_optimizer_step", 2, look))
    trainer.add_callback(At("on_optimizer_step", 3, look))
    trainer.train()
    assert temperatures[0] == temperatures[1] != temperatures[2]
    assert not biases[0].any()
    assert biases[1].any()
    marker = (Path(find_checkpoint(tmp_path)) / "moeadapt_checkpoint.json").read_text()
    assert '"skipped_steps": 1' in marker


def plain(folder: Path, rows: list[dict[str, list[int]]], **fields: Any) -> Any:
    """Make a trainer of transformers with our mixin, whose loss is the model's own."""
    trainer = make("mixin", folder, **fields)
    assert isinstance(trainer, MoETrainer)
    trainer.train_dataset = rows
    return trainer


def test_fault_055_a_batch_without_labels_is_finite_and_its_aux_loss_counts_once(
    tmp_path: Path,
) -> None:
    rows = [{"input_ids": [5, 6, 7, 8]}] * 8
    probes = {}
    for labelled in (True, False):
        trainer = plain(tmp_path / str(labelled), rows, logging_nan_inf_filter=False)
        if not labelled:
            trainer.data_collator = lambda examples: {
                **collate(examples),
                "labels": torch.full((len(examples), 4), -100),
            }
        else:
            original = trainer.compute_loss
            trainer.compute_loss = lambda *a, _f=original, **k: _f(*a, **k) * 0.0
        probes[labelled] = GradientProbe()
        trainer.add_callback(probes[labelled])
        told = nullcontext() if labelled else pytest.warns(UserWarning, match="has a label to pr")
        with told:
            trainer.train()
        logs = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        assert logs == [0.0]
    # A task loss of zero leaves the gradient of the auxiliary losses, and nothing else.
    for name, gradient in probes[True].steps[0].items():
        torch.testing.assert_close(probes[False].steps[0][name], gradient)
    assert any(g.abs().sum() > 0 for n, g in probes[False].steps[0].items() if "router" in n)


def test_fault_055_data_without_any_label_is_refused(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [-100] * 3}] * 4)
    with pytest.raises(ConfigError, match="no rows, or none is left that has a label"):
        run(tmp_path, rows=rows).train()


@pytest.mark.parametrize("kind", ["layer", "block", "ffn"])
def test_fault_056_a_batch_of_padding_alone_has_no_aux_loss(kind: str) -> None:
    balance = {"switch": 0.5, "z_loss": 0.1}
    model = adapt(tiny("llama"), moe_config(kind, balance=balance)).train()
    ids = torch.zeros(2, 5, dtype=torch.long)
    with collect_routing(model) as routings:
        out = model(input_ids=ids, attention_mask=torch.zeros_like(ids))
    (out.logits.float().sum() * 0.0).backward()
    assert not any(routing.token_mask.any() for each in routings.values() for routing in each)
    grads = [p.grad for n, p in model.named_parameters() if "router" in n and p.grad is not None]
    assert grads
    assert all(not g.any() for g in grads)


def test_fault_056_a_row_of_padding_trains(tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6, 7, 8]}] * 8
    trainer = plain(tmp_path, rows)

    def blank_first(examples: Any) -> Any:
        batch = collate(examples)
        batch["attention_mask"][0], batch["labels"][0] = 0, -100
        return batch

    trainer.data_collator = blank_first
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if "loss" in log]
    assert all(math.isfinite(value) for value in log.values())


def test_fault_057_one_token_trains_and_no_token_is_refused(tmp_path: Path) -> None:
    one = plain(tmp_path, [{"input_ids": [5]}] * 8, per_device_train_batch_size=1)
    with pytest.warns(UserWarning, match="no token of a batch of optimizer step 1") as told:
        one.train()
    assert sum("no token of a batch" in str(warning.message) for warning in told) == 1
    assert all(torch.isfinite(p).all() for p in adapter(one).values())
    none = plain(tmp_path, [{"input_ids": []}] * 8)
    before = adapter(none)
    with pytest.raises(ConfigError, match="2 rows with 0 tokens"):
        none.train()
    assert_same(adapter(none), before)
    with pytest.raises(ConfigError, match="1 rows with 0 tokens"):
        tiny_model = adapt(tiny("llama"), moe_config("block"))
        tiny_model(input_ids=torch.zeros(1, 0, dtype=torch.long))


def test_fault_081_lacking_memory_leaves_the_state_and_names_three_settings(
    tmp_path: Path,
) -> None:
    whole = run(tmp_path / "whole")
    whole.train()
    trainer = run(tmp_path / "run")
    before = BeforeStep(trainer)
    trainer.add_callback(At("on_save", 2, before))
    original = trainer.compute_loss

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return original(*args, **kwargs)

    trainer.compute_loss = compute_loss
    with pytest.raises(TrainingError) as caught:
        trainer.train()
    message = str(caught.value)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    for part in ("Tried to allocate 20.00 GiB", "GiB of weights", "GiB for the logits of 2 x"):
        assert part in message
    for knob in ("per_device_train_batch_size", "gradient_checkpointing", "max_length"):
        assert knob in message
    assert "checkpoint-2" in message
    assert_same(adapter(trainer), before.weights)
    resumed = run(tmp_path / "run")
    resumed.train(resume_from_checkpoint=True)
    assert_same(adapter(resumed), adapter(whole))
    assert hidden(tmp_path) == []
