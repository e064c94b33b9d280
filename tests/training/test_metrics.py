"""The numbers under `moe/`, and that they reach the reporters."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from moeadapt import MoeAdaptCallback
from moeadapt.balance import parse_balance
from moeadapt.routers import ROUTERS
from moeadapt.stats import RouterStats
from moeadapt.training.metrics import router_metrics
from tests.tiny import batch, labels_of
from tests.toy import toy_text
from tests.training.kit import make_trainer


def stats(load: list[float], **fields: Any) -> RouterStats:
    """Return statistics with the given load."""
    values = {"tokens": 8.0, "entropy": 0.0, "active": 1.0, "losses": (), **fields}
    shares = torch.tensor(load, dtype=torch.float64)
    return RouterStats(load=shares, importance=shares, **values)


def test_balanced_routers_have_load_one_and_entropy_one() -> None:
    even = stats([0.25] * 4, entropy=math.log(4), active=2.0)
    metrics = router_metrics({"a": even, "b": even}, {"a": {}, "b": {}})
    assert metrics == pytest.approx(
        {
            "moe/aux_loss": 0.0,
            "moe/load_max": 1.0,
            "moe/load_min": 1.0,
            "moe/entropy": 1.0,
            "moe/active_experts": 2.0,
            "moe/dead_experts": 0.0,
        }
    )


def test_a_collapsed_router_has_load_e_and_dead_experts() -> None:
    metrics = router_metrics({"a": stats([1.0, 0.0, 0.0]), "b": stats([1.0])}, {"a": {}, "b": {}})
    assert metrics["moe/load_max"] == pytest.approx((3 + 1) / 2)
    assert metrics["moe/load_min"] == pytest.approx((0 + 1) / 2)
    assert metrics["moe/dead_experts"] == 2
    assert metrics["moe/entropy"] == 0


def test_null_experts_count_in_the_largest_entropy() -> None:
    router = ROUTERS["top_k"](k=2, null_experts=4).build(8, 4)
    even = {"a": stats([0.25] * 4, entropy=math.log(8))}
    metrics = router_metrics(even, {"a": {}}, {"a": router})
    assert metrics["moe/entropy"] == pytest.approx(1.0)


def test_the_aux_loss_is_coefficient_times_loss_averaged_over_routers() -> None:
    balance = parse_balance({"switch": 0.5, "z_loss": 0.25})
    routers = {"a": stats([1.0], losses=(2.0, 4.0)), "b": stats([1.0], losses=(4.0, 8.0))}
    metrics = router_metrics(routers, dict.fromkeys(routers, balance))
    assert metrics["moe/switch"] == 3.0
    assert metrics["moe/z_loss"] == 6.0
    assert metrics["moe/aux_loss"] == pytest.approx(0.5 * 3 + 0.25 * 6)


def test_a_loss_named_like_a_metric_does_not_replace_it() -> None:
    (switch,) = parse_balance({"switch": 0.5}).values()
    metrics = router_metrics({"a": stats([1.0], losses=(7.0,))}, {"a": {"entropy": switch}})
    assert (metrics["moe/entropy"], metrics["moe/entropy_loss"]) == (0.0, 7.0)


def test_nothing_trained_gives_no_metrics() -> None:
    assert router_metrics({}, {}) == {}


class Listener(TrainerCallback):
    """A reporter: keeps the logs as they were when it was called."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any
    ) -> None:
        self.logs.append(dict(logs))


@pytest.mark.parametrize("stock", [False, True])
def test_metrics_reach_the_event_files(stock: bool, tmp_path: Path) -> None:
    callbacks = [Listener(), MoeAdaptCallback()] if stock else [Listener()]
    trainer = make_trainer(
        "SFT", tmp_path, stock=stock, callbacks=callbacks, report_to="tensorboard"
    )
    trainer.train()
    history = [log for log in trainer.state.log_history if "loss" in log]
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    for key in ("moe/aux_loss", "moe/switch", "moe/load_max", "moe/dead_experts"):
        written = events.Scalars(f"train/{key}")
        assert [event.step for event in written] == [1, 2, 3, 4]
        assert [event.value for event in written] == pytest.approx([log[key] for log in history])
    assert [log["moe/switch"] for log in callbacks[0].logs if "loss" in log] == [
        log["moe/switch"] for log in history
    ]


def test_a_callback_added_after_the_trainer_was_made_reaches_reporters_too(tmp_path: Path) -> None:
    listener = Listener()
    trainer = make_trainer("SFT", tmp_path, stock=True, callbacks=[listener], max_steps=2)
    trainer.add_callback(MoeAdaptCallback)
    order = [type(c) for c in trainer.callback_handler.callbacks]
    trainer.train()
    assert all("moe/switch" in log for log in listener.logs if "loss" in log)
    rest = [t for t in order if t is not MoeAdaptCallback]
    after = [type(c) for c in trainer.callback_handler.callbacks]
    assert after == [MoeAdaptCallback, *rest]


def test_a_window_covers_all_its_steps_and_the_next_starts_afresh(tmp_path: Path) -> None:
    single = make_trainer("SFT", tmp_path)
    single.train()
    windows = make_trainer("SFT", tmp_path, logging_steps=2)
    windows.train()
    one = [log["moe/aux_loss"] for log in single.state.log_history if "loss" in log]
    two = [log["moe/aux_loss"] for log in windows.state.log_history if "loss" in log]
    assert two == pytest.approx([(one[0] + one[1]) / 2, (one[2] + one[3]) / 2])


@pytest.mark.parametrize("stock", [False, True])
def test_what_happened_before_training_is_not_counted(stock: bool, tmp_path: Path) -> None:
    callbacks = [MoeAdaptCallback()] if stock else []
    found = []
    for before in (False, True):
        trainer = make_trainer("SFT", tmp_path, stock=stock, callbacks=callbacks, max_steps=1)
        if before:
            inputs = batch()
            trainer.model.train()
            trainer.model(**inputs, labels=labels_of(inputs)).loss.backward()
        trainer.train()
        found.append(trainer.state.log_history[0]["moe/z_loss"])
    assert found[0] == found[1]


def test_evaluation_is_not_counted(tmp_path: Path) -> None:
    args: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "logging_steps": 2}
    plain = make_trainer("SFT", tmp_path, logging_steps=2)
    plain.train()
    fields = {"eval_dataset": toy_text(4, seed=1)}
    evaluated = make_trainer("SFT", tmp_path, trainer_fields=fields, **args)
    evaluated.train()
    logs = [
        [log["moe/aux_loss"] for log in trainer.state.log_history if "loss" in log]
        for trainer in (plain, evaluated)
    ]
    assert logs[0] == logs[1]
    assert any("eval_loss" in log for log in evaluated.state.log_history)
    rest = [log for log in evaluated.state.log_history if "loss" not in log]
    assert not any(key.startswith("moe/") for log in rest for key in log)


def test_mixin_and_callback_together_log_once(tmp_path: Path) -> None:
    both = make_trainer("SFT", tmp_path, callbacks=[MoeAdaptCallback()])
    both.train()
    alone = make_trainer("SFT", tmp_path)
    alone.train()
    keys = ("loss", "moe/aux_loss", "moe/load_max")
    found = [
        [[log[key] for key in keys] for log in trainer.state.log_history if "loss" in log]
        for trainer in (both, alone)
    ]
    assert found[0] == found[1]
