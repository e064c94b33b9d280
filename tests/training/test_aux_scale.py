"""The gradient that a trainer applies is that of its own loss plus the mean auxiliary loss."""

import warnings
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import trl
from datasets import Dataset
from torch import Tensor

from moeadapt import MoeAdaptCallback, aux_loss
from moeadapt.errors import TrainingError
from moeadapt.training.param_groups import RouterOptions
from moeadapt.training.session import Session
from moeadapt.tuner.context import find_context
from tests.tiny import adapted, batch, labels_of
from tests.toy import WORDS, toy_preferences, toy_text
from tests.training.kit import (
    GradientProbe,
    assert_same_gradients,
    make_trainer,
    moe,
    parameters,
)

SGD = {
    "optim": "sgd",
    "learning_rate": 0.05,
    "max_grad_norm": 0.0,
    "max_steps": -1,
    "num_train_epochs": 1,
}


class Explicit:
    """Adds the auxiliary losses to the trainer's loss, with their graph; needs no checkpointing."""

    collected: ClassVar[list[Tensor]] = []

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        self.collected.clear()
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # SFT divides by the tokens of all micro-batches; DPO lets the trainer divide by their count
        counted = num_items_in_batch is not None and self.loss_is_scaled_for_ga is None
        steps = self.current_gradient_accumulation_steps if counted else 1
        return loss + sum(self.collected) / steps


class ExplicitSFT(Explicit, trl.SFTTrainer):
    """The reference for SFT."""


class ExplicitDPO(Explicit, trl.DPOTrainer):
    """The reference for DPO."""


EXPLICIT = {"SFT": ExplicitSFT, "DPO": ExplicitDPO}

ROWS = {"SFT": toy_text, "DPO": toy_preferences}


def explicit_gradients(name: str, folder: Path, **args: Any) -> GradientProbe:
    """Run the reference with the library's own way switched off."""

    def collect(weights: Tensor, loss: Tensor, **others: Any) -> Tensor:
        Explicit.collected.append(loss)
        return weights

    probe = GradientProbe()
    args["gradient_checkpointing"] = False
    trainer = make_trainer(name, folder, cls=EXPLICIT[name], callbacks=[probe], **args)
    find_context(trainer.model).set_scale(1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aux_loss, "attach", collect)
        trainer.train()
    return probe


def trainer_gradients(name: str, folder: Path, stock: bool, **args: Any) -> GradientProbe:
    """Run our trainer, or the stock one with the callback."""
    probe = GradientProbe()
    callbacks = [MoeAdaptCallback(), probe] if stock else [probe]
    make_trainer(name, folder, stock=stock, callbacks=callbacks, **args).train()
    return probe


@pytest.mark.parametrize(("name", "accumulation"), [("SFT", 1), ("SFT", 2), ("SFT", 4), ("DPO", 2)])
def test_gradients_are_those_of_loss_plus_aux_also_in_the_last_short_accumulation(
    name: str, accumulation: int, tmp_path: Path
) -> None:
    # 5 micro-batches an epoch: the last accumulation of each epoch has one.
    args = {**SGD, "gradient_accumulation_steps": accumulation, "num_train_epochs": 2}
    rows = ROWS[name](10)
    expected = explicit_gradients(name, tmp_path, rows=rows, **args)
    updates = 2 * -(-5 // accumulation)
    assert len(expected.steps) == updates
    for stock in (False, True):
        found = trainer_gradients(name, tmp_path, stock, rows=rows, **args)
        assert_same_gradients(found, expected, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_the_same_with_checkpointing(reentrant: bool, tmp_path: Path) -> None:
    args = {**SGD, "gradient_accumulation_steps": 2}
    rows = toy_text(6)
    expected = explicit_gradients("SFT", tmp_path, rows=rows, **args)
    checkpointing = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
    }
    found = trainer_gradients("SFT", tmp_path, False, rows=rows, **args, **checkpointing)
    assert_same_gradients(found, expected, rtol=1e-3, atol=2e-6)


def test_four_micro_batches_give_the_gradient_of_one_batch(tmp_path: Path) -> None:
    # Rows of equal length and a loss that is a mean over tokens: the split cannot matter.
    text = [" ".join(WORDS[i : i + 6]) for i in range(0, 80, 5)]
    rows = Dataset.from_dict({"text": text})
    config = {"balance": {"z_loss": 0.5}}
    whole = {**SGD, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    split = {**SGD, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    probes = [
        trainer_gradients("SFT", tmp_path, False, rows=rows, config=moe(**config), **args)
        for args in (whole, split)
    ]
    assert_same_gradients(*probes, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("step", [1, 2])
def test_the_callback_is_exact_after_resuming_inside_an_epoch(step: int, tmp_path: Path) -> None:
    args = {**SGD, "gradient_accumulation_steps": 2, "num_train_epochs": 2, "rows": toy_text(10)}
    expected = trainer_gradients("SFT", tmp_path, False, **args)
    first = tmp_path / "first"
    saving = {"save_strategy": "steps", "save_steps": step}
    make_trainer(
        "SFT", first, stock=True, callbacks=[MoeAdaptCallback()], **{**args, **saving}
    ).train()
    probe = GradientProbe()
    again = make_trainer("SFT", first, stock=True, callbacks=[MoeAdaptCallback(), probe], **args)
    again.train(resume_from_checkpoint=str(first / f"checkpoint-{step}"))
    expected.steps = expected.steps[step:]
    assert_same_gradients(probe, expected, rtol=1e-3, atol=2e-6)


def accumulation_warnings(folder: Path, callbacks: list[Any]) -> list[str]:
    """Train with accumulation and return what was said about it."""
    trainer = make_trainer(
        "SFT",
        folder,
        stock=True,
        callbacks=callbacks,
        gradient_accumulation_steps=3,
        max_steps=2,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    return [str(w.message) for w in caught if "gradients are being accumulated" in str(w.message)]


def test_a_stock_trainer_without_the_callback_warns_once(tmp_path: Path) -> None:
    assert len(accumulation_warnings(tmp_path, [])) == 1
    assert accumulation_warnings(tmp_path, [MoeAdaptCallback()]) == []


def test_data_without_a_length_is_said_to_be_inexact_by_the_callback(tmp_path: Path) -> None:
    rows = toy_text(8).to_iterable_dataset()
    args = {"rows": rows, "gradient_accumulation_steps": 2, "max_steps": 2}
    stock = make_trainer("SFT", tmp_path, stock=True, callbacks=[MoeAdaptCallback()], **args)
    with pytest.warns(UserWarning, match="has no length"):
        stock.train()
    expected = explicit_gradients("SFT", tmp_path, **args)
    found = trainer_gradients("SFT", tmp_path, False, **args)
    assert_same_gradients(found, expected, rtol=1e-3, atol=2e-6)


def test_fp16_autocast_without_a_scale_is_refused() -> None:
    model = adapted("llama", "block", balance={"switch": 0.1}).train()
    inputs = batch()
    with (
        torch.autocast("cpu", dtype=torch.float16),
        pytest.raises(TrainingError, match="MoeAdaptCallback"),
    ):
        model(**inputs, labels=labels_of(inputs))


def test_an_enabled_scaler_multiplies_the_scale_and_a_disabled_one_does_not() -> None:
    model = adapted("llama", "block", balance={"switch": 0.1})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = Session(model, torch.device("cpu"), optimizer, RouterOptions())
    scale = find_context(model).scale(torch.device("cpu"))
    for scaler, expected in (
        (torch.amp.GradScaler("cpu", init_scale=1024.0), 256.0),
        (torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=False), 0.25),
        (None, 0.25),
    ):
        session.set_scale(scaler, 4)
        assert float(scale) == expected


@pytest.mark.parametrize("stock", [False, True])
def test_a_grad_scaler_does_not_change_what_is_learned(stock: bool, tmp_path: Path) -> None:
    learned = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)):
        callbacks = [MoeAdaptCallback()] if stock else []
        args = {**SGD, "gradient_accumulation_steps": 2, "rows": toy_text(10)}
        trainer = make_trainer("SFT", tmp_path, stock=stock, callbacks=callbacks, **args)
        trainer.accelerator.scaler = scaler
        trainer.train()
        learned.append(parameters(trainer.model, adapter=True))
    assert scaler.get_scale() == 2.0**11
    for name, plain in learned[0].items():
        torch.testing.assert_close(learned[1][name], plain, msg=lambda m, n=name: f"{n}: {m}")
