"""Warnings about routers: raised once, and only when they should be."""

import math
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from moeadapt import MoeAdaptCallback
from moeadapt.errors import RoutingWarning
from moeadapt.routers import ROUTERS
from moeadapt.schedule import ScheduleValues
from moeadapt.stats import RouterStats
from moeadapt.training import health
from moeadapt.training.health import WINDOW, RouterHealth, join
from moeadapt.tuner.context import RoutingContext
from moeadapt.tuner.head import RouterHead
from tests.tiny import adapted
from tests.training.kit import make_trainer


def stats(load: list[float], active: float = 1.0, entropy: float = 1.0, tokens: float = 100.0):
    """Return statistics with the given load."""
    shares = torch.tensor(load, dtype=torch.float64)
    return RouterStats(
        tokens=tokens, load=shares, importance=shares, entropy=entropy, active=active, losses=()
    )


def head(name: str = "top_k", frozen_now: bool = False, **fields: Any) -> RouterHead:
    """Return a router of four experts at work."""
    routers = nn.ModuleDict({"default": ROUTERS[name](**fields).build(8, 4)})
    found = RouterHead("a", routers, "default", {}, RoutingContext())
    found.values = ScheduleValues(frozen=frozen_now)
    return found


EVEN = [0.25] * 4


def run(
    *steps: RouterStats,
    names: tuple[str, ...] = ("default/a",),
    router: RouterHead | None = None,
    each: int = 1,
) -> list[str]:
    """Observe the logs, of `each` optimizer steps; return the messages."""
    router = router or head()
    watch = RouterHealth()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in steps:
            watch.observe(dict.fromkeys(names, step), dict.fromkeys(names, router), steps=each)
    assert all(issubclass(one.category, RoutingWarning) for one in caught)
    return [str(one.message) for one in caught]


def test_a_balanced_router_is_well() -> None:
    assert run(*[stats(EVEN)] * 50) == []


SICK = {
    "dead": (stats([0.5, 0.3, 0.1995, 0.0005]), "default/a: experts that get less than 0.01"),
    "collapse": (stats([0.94, 0.02, 0.02, 0.02]), "default/a: an expert that over 90% of"),
    "certain": (stats(EVEN, entropy=0.009 * math.log(4)), "default/a: probabilities whose entropy"),
}


@pytest.mark.parametrize(("sick", "message"), list(SICK.values()), ids=list(SICK))
def test_each_symptom_is_told_once_when_the_window_is_full(sick: Any, message: str) -> None:
    assert run(*[sick] * (WINDOW - 1)) == []
    (said,) = run(*[sick] * 3 * WINDOW)
    assert said.startswith(message)
    assert re.search(r"over the last 20 optimizer steps\. .*(Raise|Add) ", said)


@pytest.mark.parametrize(("sick", "message"), list(SICK.values()), ids=list(SICK))
def test_a_step_or_two_are_no_symptom(sick: Any, message: str) -> None:
    assert run(*([stats(EVEN)] * 9 + [sick]) * 5) == []


@pytest.mark.parametrize(("each", "logs"), [(500, 1), (20, 1), (7, 3), (1, 20)])
def test_the_window_is_of_optimizer_steps_however_often_they_are_logged(
    each: int, logs: int
) -> None:
    sick = SICK["dead"][0]
    assert run(*[sick] * (logs - 1), each=each) == []
    (said,) = run(*[sick] * logs, each=each)
    assert f"over the last {each * logs} optimizer steps. " in said
    # Older logs than the window needs are forgotten.
    before = [stats(EVEN)] * 40
    (said,) = run(*before, *[sick] * logs, each=each)
    assert f"over the last {each * logs} optimizer steps. " in said


BORDER = {
    "dead, just not": (stats([0.5, 0.3, 0.197, 0.003]), 0),
    "certain, just not": (stats(EVEN, entropy=0.011 * math.log(4)), 0),
    "collapse, just not": (stats([0.89, 0.05, 0.03, 0.03]), 0),
    "two per token, the same two": (stats([0.5, 0.46, 0.02, 0.02], active=2.0), 1),
    "two per token, even": (stats(EVEN, active=2.0), 0),
    "two per token, a favourite": (stats([0.44, 0.2, 0.18, 0.18], active=2.0), 0),
    "three of four, as at balance": (stats([0.31, 0.31, 0.31, 0.07], active=3.0), 0),
    "all experts": (stats(EVEN, active=4.0), 0),
}


@pytest.mark.parametrize(("step", "count"), list(BORDER.values()), ids=list(BORDER))
def test_thresholds_mean_the_same_for_every_k(step: Any, count: int) -> None:
    assert len(run(*[step] * WINDOW)) == count


def test_an_experts_load_times_the_slots_of_a_token_is_the_share_that_uses_it() -> None:
    """The identity behind the threshold of a collapse."""
    chosen = torch.rand(50, 4) < torch.tensor([1.0, 0.5, 0.2, 0.1])
    load = chosen.sum(0) / chosen.sum()
    active = chosen.sum(1).double().mean()
    torch.testing.assert_close(load.double() * active, chosen.double().mean(0))


def test_three_layers_are_named_and_the_others_counted() -> None:
    names = tuple(f"default/{i}" for i in range(7))
    (said,) = run(*[SICK["dead"][0]] * WINDOW, names=names)
    assert said.startswith("default/0, default/1, default/2 and 4 more: ")


def test_steps_are_joined_as_if_they_had_been_one() -> None:
    generator = torch.Generator().manual_seed(0)
    uses, history = torch.zeros(4, dtype=torch.float64), []
    tokens = nats = 0.0
    for size in (10, 30, 7):
        chosen = (torch.rand(size, 4, generator=generator) < 0.5).double()
        entropy = float(torch.rand((), generator=generator))
        uses += chosen.sum(0)
        tokens, nats = tokens + size, nats + size * entropy
        load = (chosen.sum(0) / chosen.sum()).tolist()
        history.append(stats(load, float(chosen.sum() / size), entropy, float(size)))
    found = join(history, head())
    assert found.load == pytest.approx((uses / uses.sum()).tolist())
    assert found.active == pytest.approx(float(uses.sum()) / tokens)
    assert found.entropy == pytest.approx(nats / tokens)


@pytest.mark.parametrize(
    "router",
    [head("hash"), head("random"), head("uniform"), head(freeze=True), head(frozen_now=True)],
    ids=["hash", "random", "uniform", "freeze", "frozen now"],
)
def test_routers_that_do_not_learn_are_left_alone(router: Any) -> None:
    assert run(*[SICK["certain"][0]] * 50, router=router) == []


def test_a_router_that_chooses_its_experts_has_no_dead_ones() -> None:
    assert run(*[SICK["dead"][0]] * 50, router=head("dynamic")) == []


def test_only_the_main_process_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    other = lambda: SimpleNamespace(is_main_process=False)  # noqa: E731
    monkeypatch.setattr(health, "PartialState", other)
    assert run(*[SICK["dead"][0]] * 50) == []


@pytest.mark.parametrize("stock", [False, True])
def test_a_run_warns_once_of_its_routers(
    stock: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "WINDOW", 3)
    model = adapted("llama", "block", router={"name": "top_k", "k": 1, "init_std": 300.0})
    callbacks = [MoeAdaptCallback()] if stock else []
    trainer = make_trainer(
        "SFT", tmp_path, stock=stock, model=model.train(), callbacks=callbacks, max_steps=8,
        learning_rate=1e-6,
    )  # fmt: skip
    with pytest.warns(RoutingWarning) as caught:
        trainer.train()
    said = [str(one.message) for one in caught if issubclass(one.category, RoutingWarning)]
    assert sum("entropy" in message for message in said) == 1
    assert len(said) == len(set(said)) <= 3
    with pytest.warns(RoutingWarning):  # a run of its own
        trainer.train()


@pytest.mark.parametrize("stock", [False, True])
def test_a_run_that_logs_seldom_is_warned_at_its_first_log(
    stock: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "WINDOW", 4)
    model = adapted("llama", "block", router={"name": "top_k", "k": 1, "init_std": 300.0})
    trainer = make_trainer(
        "SFT", tmp_path, stock=stock, model=model.train(), max_steps=4, logging_steps=4,
        callbacks=[MoeAdaptCallback()] if stock else [], learning_rate=1e-6,
    )  # fmt: skip
    with pytest.warns(RoutingWarning, match="over the last 4 optimizer steps"):
        trainer.train()
