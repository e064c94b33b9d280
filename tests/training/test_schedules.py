"""A trainer follows the schedule: values, frozen routers, warm-up, selection biases, resuming."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

import moeadapt
from moeadapt import MoeAdaptCallback, collect_routing
from moeadapt.balance import BalanceConfig
from moeadapt.balance.loss_free import LossFreeConfig
from moeadapt.stats import RouterStats
from moeadapt.training.metrics import router_metrics
from moeadapt.tuner.inspect import heads_of
from tests.tiny import KINDS, adapted, batch, labels_of, moe_config
from tests.toy import toy_text
from tests.training import schedule_worker
from tests.training.kit import (
    MLP,
    GradientProbe,
    make_trainer,
    moe,
    parameters,
    routers_of,
    run_two,
)

both = pytest.mark.parametrize("stock", [False, True])


def trainer_of(folder: Path, stock: bool = False, callbacks: Any = (), **fields: Any) -> Any:
    """Make an SFT trainer, ours or the stock one with the callback, for a `moe(**moe)`."""
    config = moe(**fields.pop("moe"))
    callbacks = [*callbacks, *([MoeAdaptCallback()] if stock else [])]
    return make_trainer("SFT", folder, stock=stock, config=config, callbacks=callbacks, **fields)


def logs_of(trainer: Any, key: str) -> list[float]:
    """Return what was logged beside the loss."""
    return [log[key] for log in trainer.state.log_history if "loss" in log]


class Recorder(TrainerCallback):
    """Copies the adapter, buffers included, before the first and after each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_train_begin(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self._copy(model)

    def on_step_end(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self._copy(model)

    def _copy(self, model: nn.Module) -> None:
        state = model.state_dict()
        self.steps.append({n: t.clone() for n, t in state.items() if "moeadapt_" in n})

    def moved(self, part: str) -> list[bool]:
        """Return for each step whether any tensor with `part` in its name changed."""
        pairs = zip(self.steps, self.steps[1:], strict=False)
        return [any(not torch.equal(a[n], b[n]) for n in a if part in n) for a, b in pairs]


# --- values


@both
@pytest.mark.parametrize("kind", KINDS)
def test_k_and_temperature_follow_the_steps(kind: str, stock: bool, tmp_path: Path) -> None:
    schedule = {
        "k": {"start": 4, "end": 1, "steps": 6},
        "temperature": {"start": 5.0, "steps": 4},
        "k_inference": 3,
    }
    config = moe_config(kind, target_modules=MLP, schedule=schedule)
    callbacks = [MoeAdaptCallback()] if stock else []
    trainer = make_trainer(
        "SFT", tmp_path, stock=stock, config=config, callbacks=callbacks, max_steps=7
    )
    trainer.train()
    expected = [4, 4, 3, 3, 2, 2, 1]
    assert logs_of(trainer, "moe/k") == expected
    assert logs_of(trainer, "moe/active_experts") == pytest.approx(expected)
    assert logs_of(trainer, "moe/temperature") == pytest.approx([5, 4, 3, 2, 1, 1, 1])
    routers = [head.router for head in heads_of(trainer.model.train()).values()]
    assert {(r.k, r.max_active, r.temperature) for r in routers} == {(3, 3, 1.0)}


@both
def test_evaluation_while_training_uses_inference_values_without_dropout(
    stock: bool, tmp_path: Path
) -> None:
    schedule = {
        "k": {"start": 4, "end": 3, "steps": 9},
        "k_inference": 1,
        "temperature": {"start": 5.0, "end": 0.5, "steps": 9},
        "expert_dropout": 0.5,
        "gate_dropout": 0.5,
    }
    trainer = trainer_of(
        tmp_path,
        stock,
        moe={"schedule": schedule},
        trainer_fields={"eval_dataset": toy_text(4, seed=1)},
        eval_strategy="steps",
        eval_steps=1,
    )
    seen = []
    evaluate = trainer.prediction_step

    def watched(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with collect_routing(model) as found:
            first = evaluate(model, *args, **kwargs)
        seen.extend((r.weights != 0).sum(-1).unique().tolist() for rs in found.values() for r in rs)
        seen.extend(head.router.temperature for head in heads_of(model).values())
        assert torch.equal(first[0], evaluate(model, *args, **kwargs)[0])
        return first

    trainer.prediction_step = watched
    trainer.train()
    assert seen
    assert all(value in ([1], 0.5) for value in seen)
    assert all(1 < active < 3.5 for active in logs_of(trainer, "moe/active_experts"))
    assert all(loss < 100 for loss in logs_of(trainer, "moe/z_loss"))


@both
def test_resuming_with_a_schedule_gives_the_bits_of_the_uninterrupted_run(
    stock: bool, tmp_path: Path
) -> None:
    fields = {
        "balance": {"switch": 0.5, "loss_free": {"rate": 0.05}},
        "schedule": {
            "k": {"start": 4, "end": 1, "steps": 5},
            "temperature": {"start": 4.0, "steps": 5, "shape": "exponential"},
            "freeze_router_steps": 1,
            "router_warmup_steps": 4,
            "freeze_router_after": 5,
            "expert_dropout": 0.25,
            "gate_dropout": 0.25,
        },
    }
    recorders = [Recorder(), Recorder()]
    whole, resumed = (
        trainer_of(
            tmp_path,
            stock,
            [recorder],
            moe=fields,
            max_steps=6,
            save_strategy="steps" if recorder is recorders[0] else "no",
            save_steps=3,
        )
        for recorder in recorders
    )
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert len(recorders[0].steps) == 7
    assert len(recorders[1].steps) == 4
    for mine, theirs in zip(recorders[0].steps[3:], recorders[1].steps, strict=True):
        assert mine.keys() == theirs.keys()
        assert any("selection_bias" in name for name in mine)
        for name, tensor in mine.items():
            assert torch.equal(theirs[name], tensor), name
    assert logs_of(resumed, "moe/k") == logs_of(whole, "moe/k")


# --- frozen and warmed up


@both
def test_a_frozen_router_is_bitwise_unchanged_and_the_experts_are_not(
    stock: bool, tmp_path: Path
) -> None:
    fields = {
        "schedule": {"freeze_router_steps": 2, "freeze_router_after": 5},
        "balance": {"switch": 0.5, "loss_free": {"rate": 0.05}},
    }
    recorder = Recorder()
    trainer = trainer_of(
        tmp_path, stock, [recorder], moe=fields, max_steps=7, optim="adamw_torch", weight_decay=0.5
    )
    trainer.train()
    frozen = [False, False, True, True, True, False, False]
    assert recorder.moved("moeadapt_router") == frozen
    assert recorder.moved("selection_bias") == frozen
    experts = {name.split("moeadapt_")[1] for name in recorder.steps[0] if "router" not in name}
    assert experts
    for part in experts:
        assert recorder.moved(part)[-6:] == [True] * 6
    assert all(p.requires_grad for p in routers_of(trainer.model).values())


@both
def test_a_frozen_router_does_not_count_in_the_trainers_gradient_norm(
    stock: bool, tmp_path: Path
) -> None:
    probe = GradientProbe()
    trainer = trainer_of(
        tmp_path, stock, [probe], moe={"schedule": {"freeze_router_steps": 1}}, max_grad_norm=0.5
    )
    trainer.train()
    routers = set(routers_of(trainer.model))
    for step, gradients in enumerate(probe.steps):
        is_zero = [not gradients[name].any() for name in routers]
        assert all(is_zero) if step == 0 else not any(is_zero)
        rest = torch.cat([g.flatten() for n, g in gradients.items() if n not in routers])
        assert (float(rest.norm()) == pytest.approx(0.5, rel=1e-3)) == (step == 0)


@both
def test_warm_up_multiplies_the_routers_rate_on_top_of_the_trainers_schedule(
    stock: bool, tmp_path: Path
) -> None:
    probe, recorder = GradientProbe(), Recorder()
    trainer = trainer_of(
        tmp_path,
        stock,
        [probe, recorder],
        moe={"schedule": {"router_warmup_steps": 4}},
        optim="sgd",
        learning_rate=0.5,
        lr_scheduler_type="linear",
        max_steps=5,
    )
    trainer.train()
    routers = set(routers_of(trainer.model))
    for step, gradients in enumerate(probe.steps):
        rate = 0.5 * (5 - step) / 5
        before, after = recorder.steps[step], recorder.steps[step + 1]
        for name, gradient in gradients.items():
            factor = min((step + 1) / 4, 1.0) if name in routers else 1.0
            torch.testing.assert_close(after[name], before[name] - rate * factor * gradient)


# --- what follows an optimizer step


class Calls:
    """Records each call of `LossFreeConfig.after_step`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens: list[float] = []
        self.uses: list[Tensor] = []
        real = LossFreeConfig.after_step

        def after_step(config: Any, router: Any, tokens: Tensor, uses: Tensor) -> None:
            self.tokens.append(float(tokens))
            self.uses.append(uses.clone())
            real(config, router, tokens, uses)

        monkeypatch.setattr(LossFreeConfig, "after_step", after_step)


LOSS_FREE = {"balance": {"loss_free": {"rate": 0.25}}}


@both
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_selection_bias_moves_once_per_step_by_what_the_whole_step_used(
    stock: bool, checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, recorder, calls = toy_text(24), Recorder(), Calls(monkeypatch)
    trainer = trainer_of(
        tmp_path,
        stock,
        [recorder],
        moe=LOSS_FREE,
        rows=rows,
        gradient_accumulation_steps=4,
        gradient_checkpointing=checkpointing,
        max_steps=3,
    )
    trainer.train()
    biases = [n for n in recorder.steps[0] if "selection_bias" in n]
    assert len(biases) == 2
    assert len(calls.uses) == 3 * len(biases)
    seen = sum(log.get("num_tokens", 0) for log in trainer.state.log_history[2:3])
    assert sum(calls.tokens[::2]) == seen > 0
    for step in range(3):
        before, after = recorder.steps[step : step + 2]
        for name, uses in zip(biases, calls.uses[2 * step :], strict=False):
            assert uses.sum() == 2 * calls.tokens[2 * step]
            expected = before[name] + 0.25 * (uses.mean() - uses).sign()
            assert torch.equal(after[name], expected)


def test_accumulating_and_checkpointing_give_the_biases_of_one_batch(tmp_path: Path) -> None:
    found = []
    for args in (
        {"per_device_train_batch_size": 8},
        {"gradient_accumulation_steps": 4},
        {"gradient_accumulation_steps": 4, "gradient_checkpointing": True},
    ):
        recorder = Recorder()
        trainer = trainer_of(
            tmp_path, False, [recorder], moe=LOSS_FREE, rows=toy_text(24), max_steps=3, **args
        )
        trainer.train()
        found.append([v for s in recorder.steps for n, v in s.items() if "selection_bias" in n])
    assert any(bias.any() for bias in found[0])
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_mixin_and_callback_together_follow_a_step_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch)
    recorders = [Recorder(), Recorder()]
    schedule = {"router_warmup_steps": 8, "k": {"start": 4, "end": 2, "steps": 4}}
    for recorder, more in zip(recorders, ([], [MoeAdaptCallback()]), strict=True):
        calls.uses.clear()
        fields = {**LOSS_FREE, "schedule": schedule}
        trainer_of(tmp_path, False, [recorder, *more], moe=fields).train()
        assert len(calls.uses) == 2 * 4
    for mine, theirs in zip(recorders[0].steps, recorders[1].steps, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the worker in two processes and return what they wrote."""
    folder = tmp_path_factory.mktemp("two")
    run_two("tests.training.schedule_worker", folder)
    return folder


@pytest.mark.parametrize("kind", schedule_worker.KINDS)
def test_two_processes_train_what_one_trains(kind: str, folder: Path, tmp_path: Path) -> None:
    alone = schedule_worker.train(kind, tmp_path, gradient_accumulation_steps=2)
    left, right = (torch.load(folder / f"adapters-{rank}.pt")[kind] for rank in range(2))
    assert left.keys() == right.keys() == alone.keys()
    assert any(t.any() for n, t in alone.items() if "selection_bias" in n)
    for name, tensor in alone.items():
        assert torch.equal(left[name], right[name]), name
        torch.testing.assert_close(left[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


# --- a loop of one's own


def test_a_loop_of_ones_own_freezes_warms_up_and_balances() -> None:
    schedule = {"freeze_router_steps": 1, "router_warmup_steps": 2}
    balance = {"loss_free": {"rate": 0.25}}
    model = adapted("llama", "block", schedule=schedule, balance=balance).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    moeadapt.attach_optimizer(model, optimizer)
    inputs = batch()
    for step, factor in enumerate([0.0, 0.5, 1.0, 1.0]):
        moeadapt.step_schedule(model, step)
        model(**inputs, labels=labels_of(inputs)).loss.backward()
        gradients = {n: p.grad.clone() for n, p in routers_of(model).items()}
        before = parameters(model, adapter=True)
        biases = [head.router.selection_bias.clone() for head in heads_of(model).values()]
        optimizer.step()
        moeadapt.after_optimizer_step(model)
        optimizer.zero_grad()
        for name, parameter in routers_of(model).items():
            expected = before[name] - 0.5 * factor * gradients[name]
            torch.testing.assert_close(parameter.detach(), expected)
        now = [head.router.selection_bias for head in heads_of(model).values()]
        moved = [not torch.equal(a, b) for a, b in zip(biases, now, strict=True)]
        assert any(moved) == (step > 0)


# --- metrics


def router_stats(null_share: float, losses: tuple[float, ...] = ()) -> RouterStats:
    """Return statistics of a balanced router."""
    even = torch.full((4,), 0.25, dtype=torch.float64)
    fields: dict[str, Any] = {"tokens": 8.0, "entropy": 0.0, "active": 1.0, "losses": losses}
    return RouterStats(load=even, importance=even, null_share=null_share, **fields)


def test_the_null_share_is_averaged_over_routers_that_have_null_experts(tmp_path: Path) -> None:
    config = moe_config("block", router={"name": "top_k", "null_experts": 4, "init_std": 0.5})
    trainer = make_trainer("SFT", tmp_path, config=config, max_steps=2)
    trainer.train()
    shares = logs_of(trainer, "moe/null_share")
    actives = logs_of(trainer, "moe/active_experts")
    assert all(0 < share < 1 for share in shares)
    assert [2 * (1 - share) for share in shares] == pytest.approx(actives)
    routers = [head.router for head in heads_of(trainer.model).values()][:1]
    plain = adapted("llama", "block")
    other = next(iter(heads_of(plain).values())).router
    stats = {"a": router_stats(0.5), "b": router_stats(0.0)}
    empty: dict[str, Any] = {"a": {}, "b": {}}
    metrics = router_metrics(stats, empty, {"a": routers[0], "b": other})
    assert metrics["moe/null_share"] == 0.5
    assert "moe/null_share" not in router_metrics(stats, empty, {"a": other, "b": other})


def test_the_aux_loss_uses_the_coefficient_of_now() -> None:
    class Live(BalanceConfig):
        def loss(self, routing: Any, mixture: Any) -> Any:
            raise NotImplementedError  # only the coefficient is asked for

        def coefficient(self, router: Any) -> Any:
            return torch.tensor(0.25)

    router = next(iter(heads_of(adapted("llama", "block")).values())).router
    stats, balance = {"a": router_stats(0.0, (8.0,))}, {"a": {"live": Live(coef=1.0)}}
    assert router_metrics(stats, balance, {"a": router})["moe/aux_loss"] == 2.0
    assert router_metrics(stats, balance)["moe/aux_loss"] == 8.0


def test_without_a_schedule_neither_k_nor_temperature_is_logged(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, moe={"schedule": {"expert_dropout": 0.5}}, max_steps=1)
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if "loss" in log]
    assert not {"moe/k", "moe/temperature", "moe/null_share"} & set(log)
