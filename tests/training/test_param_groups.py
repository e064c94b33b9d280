"""Routers have a learning rate, a weight decay and a gradient norm of their own, in any loop."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn

import moeadapt
from moeadapt import MoeAdaptCallback
from moeadapt.errors import ConfigError, TrainingError
from moeadapt.training import run, session, sharding
from moeadapt.training.objectives import Objective
from moeadapt.training.param_groups import RouterOptions
from moeadapt.training.recipe import parse_recipe
from moeadapt.tuner.inspect import heads_of
from tests.tiny import adapted, batch, labels_of
from tests.training.kit import GradientProbe, make_trainer, parameters, routers_of


def model_and_optimizer(kind: Any = torch.optim.AdamW, **options: Any) -> tuple[Any, Any]:
    """Return a model in training mode and an optimizer over what it trains."""
    model = adapted("llama", "block", balance={"switch": 0.5}).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, kind(trained, **{"lr": 0.01, **options})


def backward(model: nn.Module, seed: int = 0) -> None:
    """Back-propagate one batch."""
    inputs = batch(seed=seed)
    model.zero_grad()
    model(**inputs, labels=labels_of(inputs)).loss.backward()


def other(model: nn.Module) -> dict[str, Tensor]:
    """Return the expert parameters."""
    routers = routers_of(model)
    return {n: p for n, p in model.named_parameters() if p.requires_grad and n not in routers}


def norm(tensors: Any) -> float:
    """Return the norm of all tensors as one vector."""
    return float(torch.cat([t.detach().flatten() for t in tensors]).norm())


def shape_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return the groups with the identities of their parameters."""
    return [{**g, "params": [id(p) for p in g["params"]]} for g in optimizer.param_groups]


def test_a_step_equals_one_with_real_groups_and_leaves_the_groups_alone() -> None:
    lent, optimizer = model_and_optimizer(weight_decay=0.1)
    moeadapt.attach_optimizer(lent, optimizer, router_learning_rate=0.5, router_weight_decay=0.25)
    split, _ = model_and_optimizer()
    reference = torch.optim.AdamW(
        [
            {"params": list(other(split).values()), "lr": 0.01, "weight_decay": 0.1},
            {"params": list(routers_of(split).values()), "lr": 0.5, "weight_decay": 0.25},
        ]
    )
    before = shape_of(optimizer)
    for step in range(3):
        for model, one in ((lent, optimizer), (split, reference)):
            backward(model, step)
            one.step()
        assert shape_of(optimizer) == before
    for name, expected in parameters(split, adapter=True).items():
        torch.testing.assert_close(parameters(lent, adapter=True)[name], expected)


def test_a_scheduler_scales_the_routers_rate_as_the_common_one() -> None:
    model, optimizer = model_and_optimizer(torch.optim.SGD, lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    moeadapt.attach_optimizer(model, optimizer, router_learning_rate=0.02)
    for step in range(3):
        before = {n: p.detach().clone() for n, p in routers_of(model).items()}
        backward(model, step)
        optimizer.step()
        scheduler.step()
        for name, parameter in routers_of(model).items():
            expected = before[name] - 0.02 / (1 + step) * parameter.grad
            torch.testing.assert_close(parameter.detach(), expected)


def test_only_the_routers_are_clipped_and_only_when_they_are_too_long() -> None:
    model, optimizer = model_and_optimizer(torch.optim.SGD)
    backward(model)
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    length = norm(grads[name] for name in routers_of(model))
    for limit in (length / 4, length * 4):
        for name, parameter in model.named_parameters():
            parameter.grad = grads[name].clone() if name in grads else None
        moeadapt.attach_optimizer(model, optimizer, router_max_grad_norm=limit)
        optimizer.step()
        factor = min(1.0, limit / length)
        for name, parameter in routers_of(model).items():
            torch.testing.assert_close(parameter.grad, grads[name] * factor)
        for name, parameter in other(model).items():
            assert torch.equal(parameter.grad, grads[name])


@pytest.mark.parametrize("fused", [False, True])
def test_with_a_grad_scaler_the_norm_is_that_of_the_unscaled_gradients(fused: bool) -> None:
    found = []
    for scale in (1.0, 1024.0):
        model, optimizer = model_and_optimizer(torch.optim.SGD, fused=fused)
        moeadapt.attach_optimizer(model, optimizer, router_max_grad_norm=1e-3)
        backward(model)
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad *= scale
        if scale == 1.0:
            optimizer.step()
        else:
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            scaler.scale(torch.ones(()))
            scaler.step(optimizer)
        found.append(parameters(model, adapter=True))
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-5, atol=1e-9)


def test_a_step_that_fails_leaves_the_groups_for_the_next() -> None:
    model, optimizer = model_and_optimizer()
    moeadapt.attach_optimizer(model, optimizer, router_learning_rate=0.5)
    before = shape_of(optimizer)
    backward(model)

    def fail() -> None:
        raise RuntimeError("closure")

    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step(fail)
    optimizer.step()
    assert shape_of(optimizer) == before


def test_attaching_again_replaces_but_keeps_options_and_removing_undoes() -> None:
    model, optimizer = model_and_optimizer(torch.optim.SGD, lr=0.1)
    moeadapt.attach_optimizer(model, optimizer, router_learning_rate=0.05)
    attached = moeadapt.attach_optimizer(model, optimizer, router_max_grad_norm=1e9)
    assert attached.options.learning_rate == 0.05
    for rate in (0.05, 0.1):
        before = {n: p.detach().clone() for n, p in routers_of(model).items()}
        backward(model)
        optimizer.step()
        for name, parameter in routers_of(model).items():
            torch.testing.assert_close(parameter.detach(), before[name] - rate * parameter.grad)
        attached.remove()


def test_a_rate_that_follows_a_rate_of_zero_is_refused() -> None:
    model, optimizer = model_and_optimizer(lr=0.0)
    with pytest.raises(ConfigError, match="split_router_params"):
        moeadapt.attach_optimizer(model, optimizer, router_learning_rate=0.5)


@pytest.mark.parametrize(
    "option",
    [
        {"router_learning_rate": 0.0},
        {"router_weight_decay": -1.0},
        {"router_max_grad_norm": 0.0},
        {"router_max_grad_norm": float("inf")},
    ],
)
def test_a_bad_option_is_refused_at_once(option: dict[str, float]) -> None:
    (name,) = option
    with pytest.raises(ConfigError, match=name):
        MoeAdaptCallback(**option)


OPTIONS = {
    "router_learning_rate": 5e-3,
    "router_weight_decay": 0.25,
    "router_max_grad_norm": 1e-2,
}


def test_the_callback_trains_what_the_mixin_trains(tmp_path: Path) -> None:
    """Ours has real groups, the callback lends them; the trainer clips before either."""
    found = []
    for stock in (False, True):
        trainer = make_trainer(
            "SFT",
            tmp_path,
            stock=stock,
            callbacks=[MoeAdaptCallback(**OPTIONS)] if stock else [],
            trainer_fields={} if stock else OPTIONS,
            max_grad_norm=0.5,
            weight_decay=0.1,
            lr_scheduler_type="linear",
            warmup_steps=1,
        )
        trainer.train()
        found.append(parameters(trainer.model, adapter=True))
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected)


@pytest.mark.parametrize("stock", [False, True])
def test_the_routers_norm_is_limited_after_the_trainers_own_clipping(
    stock: bool, tmp_path: Path
) -> None:
    class Lengths(GradientProbe):
        def on_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
            super().on_pre_optimizer_step(*args, model=model, **kwargs)

    probe = Lengths()
    options = {"router_max_grad_norm": 1e-3}
    trainer = make_trainer(
        "SFT",
        tmp_path,
        stock=stock,
        callbacks=[probe, *([MoeAdaptCallback(**options)] if stock else [])],
        trainer_fields={} if stock else options,
        max_grad_norm=0.5,
    )
    trainer.train()
    before, after = probe.steps[::2], probe.steps[1::2]
    assert len(before) == len(after) == 4
    routers = set(routers_of(trainer.model))
    for early, late in zip(before, after, strict=True):
        assert norm(early.values()) == pytest.approx(0.5, rel=1e-3)
        assert norm(early[n] for n in routers) > 2e-3
        assert norm(late[n] for n in routers) == pytest.approx(1e-3, rel=1e-2)
        assert all(torch.equal(early[n], late[n]) for n in early if n not in routers)


def test_the_callback_resumes_with_its_options_bit_by_bit(tmp_path: Path) -> None:
    def run(**args: Any) -> Any:
        callbacks = [MoeAdaptCallback(**OPTIONS)]
        config = {"save_strategy": "steps", "save_steps": 2, **args}
        return make_trainer("SFT", tmp_path, stock=True, callbacks=callbacks, **config)

    whole = run()
    whole.train()
    resumed = run(save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    found = parameters(resumed.model, adapter=True)
    for name, expected in parameters(whole.model, adapter=True).items():
        assert torch.equal(found[name], expected), name


def test_nothing_stays_on_the_optimizer_after_training(tmp_path: Path) -> None:
    trainer = make_trainer("SFT", tmp_path, max_steps=1)
    trainer.train()
    inner = trainer.optimizer
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    assert not inner._optimizer_step_pre_hooks
    assert not inner._optimizer_step_post_hooks
    assert not any(head.optimizer_attached for head in heads_of(trainer.model).values())
    copy.deepcopy(trainer.model)


SFT = ["--model_name_or_path", "x", "--output_dir", "unused", "--use_cpu", "--bf16", "false"]


def test_a_recipe_passes_the_options_and_the_schedule_to_the_trainer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = ["--router_learning_rate", "5e-3", "--router_weight_decay=0.25"]
    flags += ["--router-max-grad-norm", "0.5", "--moe.schedule.k.start", "4"]
    recipe = parse_recipe("sft", None, [*SFT, *flags, "--moe.schedule.k.steps", "9"])
    assert recipe.adapter.schedule["k"] == {"start": 4, "end": None, "steps": 9}
    monkeypatch.setattr(run, "load_base", lambda *_: (nn.Linear(1, 1), None))
    monkeypatch.setattr(run, "load_data", lambda *_: (None, None))
    monkeypatch.setattr(Objective, "trainer_class", lambda _, is_mixture: dict)
    built = run.build_trainer(recipe)
    assert built["router_learning_rate"] == 5e-3
    assert built["router_weight_decay"] == 0.25
    assert built["router_max_grad_norm"] == 0.5


def test_a_recipe_refuses_a_bad_option_and_a_bad_schedule() -> None:
    with pytest.raises(ConfigError, match=r"flags: router_learning_rate=-1.0 must be"):
        parse_recipe("sft", None, [*SFT, "--router_learning_rate", "-1.0"])
    with pytest.raises(ConfigError, match="did you mean 'temperature'"):
        parse_recipe("sft", None, [*SFT, "--moe.schedule.temprature.start", "2.0"])
    with pytest.raises(ConfigError, match="did you mean 'router_learning_rate'"):
        parse_recipe("sft", None, [*SFT, "--router_lerning_rate", "1.0"])


def test_sharded_setups_refuse_what_they_would_ignore(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = model_and_optimizer()
    cpu = torch.device("cpu")
    frozen = adapted("llama", "block", schedule={"freeze_router_steps": 1})
    clip, rate = RouterOptions(max_grad_norm=1.0), RouterOptions(learning_rate=1.0)
    plain = RouterOptions()
    for kind, refused, allowed in (
        ("DEEPSPEED", [(model, clip), (model, rate), (frozen, plain)], [(model, plain)]),
        ("FSDP", [(model, clip)], [(model, rate), (frozen, plain)]),
    ):
        state = SimpleNamespace(distributed_type=DistributedType[kind])
        for module in (session, sharding):
            monkeypatch.setattr(module, "AcceleratorState", lambda state=state: state)
        for one, options in refused:
            with pytest.raises(TrainingError, match=f"under {kind}"):
                session.Session(one, cpu, optimizer, options)
        for one, options in allowed:
            session.Session(one, cpu, optimizer, options).end()
