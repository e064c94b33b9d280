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

from moeadapt import MoeAdaptCallback, override_routing
from moeadapt.errors import ConfigError, RoutingWarning, TrainingError
from moeadapt.routers import ROUTERS
from moeadapt.schedule import ScheduleValues
from moeadapt.stats import RouterStats
from moeadapt.training import health
from moeadapt.training.health import WINDOW, RouterHealth, join
from moeadapt.training.recipe import parse_recipe
from moeadapt.training.uniform_check import compare_with_uniform
from moeadapt.tuner.context import RoutingContext
from moeadapt.tuner.head import RouterHead
from tests.tiny import adapted, batch, labels_of
from tests.toy import toy_text
from tests.training.kit import make_trainer, moe, parameters


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
    *steps: RouterStats, names: tuple[str, ...] = ("default/a",), router: RouterHead | None = None
) -> list[str]:
    """Observe the steps; return the messages."""
    router = router or head()
    watch = RouterHealth()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in steps:
            watch.observe(dict.fromkeys(names, step), dict.fromkeys(names, router))
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
    assert re.search(r"over the last 20 logged steps\. .*(Raise|Add) ", said)


@pytest.mark.parametrize(("sick", "message"), list(SICK.values()), ids=list(SICK))
def test_a_step_or_two_are_no_symptom(sick: Any, message: str) -> None:
    assert run(*([stats(EVEN)] * 9 + [sick]) * 5) == []


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


@torch.no_grad()
def slow_losses(model: Any, batches: list[Any]) -> tuple[float, float]:
    """Return the mean loss, learned and uniform."""
    learned = [float(model(**one).loss) for one in batches]
    with override_routing(model, router="uniform"):
        uniform = [float(model(**one).loss) for one in batches]
    return sum(learned) / len(learned), sum(uniform) / len(uniform)


@pytest.fixture(scope="module")
def two() -> Any:
    """A model, and batches on which its routing is worse and better than uniform."""
    model = adapted("llama", "block").double()
    better, worse = [], []
    for seed in range(40):
        inputs = batch(seed=seed)
        one = {**inputs, "labels": labels_of(inputs), "unknown": ["a", "b", "c"]}
        plain = {name: value for name, value in one.items() if name != "unknown"}
        learned, uniform = slow_losses(model, [plain])
        (better if learned < uniform else worse).append(one)
    assert len(better) > 2
    assert len(worse) > 2
    return model, better, worse


def test_learned_routing_that_is_better_is_not_warned_of(two: Any) -> None:
    model, better, _ = two
    assert compare_with_uniform(model.train(), better, torch.device("cpu"))
    assert model.training


def test_learned_routing_that_is_no_better_is_warned_of_with_both_losses(two: Any) -> None:
    model, _, worse = two
    plain = [{n: v for n, v in one.items() if n != "unknown"} for one in worse[:8]]
    learned, uniform = slow_losses(model.eval(), plain)
    with pytest.warns(RoutingWarning, match=f"loss {learned:.4f} and {uniform:.4f} on the first"):
        assert not compare_with_uniform(model, worse, torch.device("cpu"))


def test_at_most_eight_batches_are_computed(two: Any) -> None:
    model, better, _ = two
    taken = []

    def batches() -> Any:
        for one in better * 9:
            taken.append(one)
            yield one

    compare_with_uniform(model, batches(), torch.device("cpu"))
    assert len(taken) == 8


def test_batches_without_labels_and_no_batches_are_refused(two: Any) -> None:
    model = two[0]
    with pytest.raises(TrainingError, match="compares the loss on labels"):
        compare_with_uniform(model, [batch()], torch.device("cpu"))
    with pytest.raises(TrainingError, match="gave no batches"):
        compare_with_uniform(model, [], torch.device("cpu"))


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize("asked", [False, True])
def test_evaluations_of_a_run_compare_only_if_asked(
    stock: bool, asked: bool, tmp_path: Path
) -> None:
    # Experts without effect: learned and uniform routing are alike.
    config = {"compare_uniform": asked}
    trainer = make_trainer(
        "SFT", tmp_path, stock=stock, max_steps=2, eval_strategy="steps", eval_steps=1,
        callbacks=[MoeAdaptCallback(**config)] if stock else [],
        learning_rate=1e-30,
        trainer_fields={"eval_dataset": toy_text(4), **({} if stock else config)},
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RoutingWarning)
        trainer.train()
    said = [str(one.message) for one in caught if issubclass(one.category, RoutingWarning)]
    assert [message.partition(":")[0] for message in said] == [
        "learned routing is no better than all experts in equal shares"
    ] * asked
    assert len([log for log in trainer.state.log_history if "eval_loss" in log]) == 2


@pytest.mark.parametrize("stock", [False, True])
def test_the_comparison_does_not_change_the_training(stock: bool, tmp_path: Path) -> None:
    """Dropout and the order of rows come from the generators, which a comparison must not move."""
    trained = []
    for asked in (False, True):
        option = {"compare_uniform": asked}
        trainer = make_trainer(
            "SFT", tmp_path, stock=stock, max_steps=4, eval_strategy="steps", eval_steps=1,
            gradient_accumulation_steps=2, rows=toy_text(6), config=moe(lora_dropout=0.5),
            callbacks=[MoeAdaptCallback(**option)] if stock else [],
            trainer_fields={"eval_dataset": toy_text(100), **({} if stock else option)},
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RoutingWarning)
            trainer.train()
        trained.append(parameters(trainer.model, adapter=True))
        running = trainer.accelerator.gradient_state.dataloader_references
        lengths = [len(loader.dataset) for loader in running if loader is not None]
        assert 100 not in lengths, "an evaluation still counts as running"
    for name, value in trained[0].items():
        assert torch.equal(value, trained[1][name]), name


FLAGS = ["--model_name_or_path", "x", "--output_dir", "unused", "--use_cpu", "--bf16", "false"]
EVALUATED = ["--compare_uniform", "true", "--eval_strategy", "epoch"]


def test_a_recipe_can_ask_for_the_comparison() -> None:
    assert parse_recipe("sft", None, [*FLAGS, *EVALUATED]).router_keywords["compare_uniform"]
    assert not parse_recipe("sft", None, FLAGS).router_keywords["compare_uniform"]


WRONG = {
    "lora": ("sft", [*EVALUATED, "--lora.r", "2"], "for mixtures trained by sft"),
    "dpo": ("dpo", EVALUATED, "for mixtures trained by sft"),
    "no evaluation": ("sft", EVALUATED[:2], "set eval_strategy"),
}


@pytest.mark.parametrize(("goal", "flags", "message"), list(WRONG.values()), ids=list(WRONG))
def test_a_recipe_that_asks_in_vain_is_refused(goal: str, flags: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_recipe(goal, None, [*FLAGS, *flags])
