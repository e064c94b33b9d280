"""Learned routing against equal shares: warned of where it is shown to be no better."""

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moeadapt import MoeAdaptCallback, override_routing
from moeadapt.errors import ConfigError, RoutingWarning, TrainingError
from moeadapt.training import uniform_check
from moeadapt.training.recipe import parse_recipe
from moeadapt.training.uniform_check import compare_with_uniform
from tests.tiny import adapted, batch, labels_of
from tests.toy import toy_text
from tests.training.kit import make_trainer, moe, parameters


@torch.no_grad()
def slow_losses(model: Any, batches: list[Any]) -> tuple[float, float]:
    """Return the mean loss per token, learned and uniform."""
    counts = [int((one["labels"][:, 1:] != -100).sum()) for one in batches]
    learned = [float(model(**one).loss) * n for one, n in zip(batches, counts, strict=True)]
    with override_routing(model, router="uniform"):
        uniform = [float(model(**one).loss) * n for one, n in zip(batches, counts, strict=True)]
    return sum(learned) / sum(counts), sum(uniform) / sum(counts)


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
    with pytest.warns(RoutingWarning, match=f"loss {learned:.4f} and {uniform:.4f} nats per"):
        assert not compare_with_uniform(model, worse, torch.device("cpu"))


def compared(monkeypatch: pytest.MonkeyPatch, losses: Any) -> Any:
    """Compare summed losses [2, rows] of rows of ten tokens; return the answer and the words."""
    said = []
    both = iter(torch.tensor(losses, dtype=torch.float64))
    ten = torch.full((len(losses[0]),), 10.0, dtype=torch.float64)
    monkeypatch.setattr(uniform_check, "_row_losses", lambda model, some: (next(both), ten))
    monkeypatch.setattr(uniform_check, "override_routing", lambda *a, **k: nullcontext())
    monkeypatch.setattr(uniform_check, "warn", said.append)
    some = [{"labels": torch.zeros(1, 2)}]
    return compare_with_uniform(nn.Identity(), some, torch.device("cpu")), said


def test_a_tie_of_noisy_rows_is_no_coin_flip(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 rows that differ by a nat per token either way: nothing is shown, so nothing is said."""
    for seed in range(20):
        noise = torch.randn(2, 16, generator=torch.Generator().manual_seed(seed))
        found, said = compared(monkeypatch, (20 + 10 * noise).tolist())
        assert found, said


@pytest.mark.parametrize(
    ("gain", "warned"), [(0.0, True), (-0.5, True), (0.004, False), (0.05, False)]
)
def test_a_tie_without_noise_is_warned_of_and_a_clear_gain_is_not(
    monkeypatch: pytest.MonkeyPatch, gain: float, warned: bool
) -> None:
    learned = [20.0 + row for row in range(16)]
    uniform = [loss + 10 * gain + 0.01 * (-1) ** row for row, loss in enumerate(learned)]
    found, said = compared(monkeypatch, [learned, uniform])
    assert (found, len(said)) == (not warned, int(warned))


def test_too_few_rows_are_said_to_be_too_few(monkeypatch: pytest.MonkeyPatch) -> None:
    found, (said,) = compared(monkeypatch, [[20.0] * 7, [20.0] * 7])
    assert not found
    assert "7 evaluation rows are too few" in said


def test_rows_of_all_processes_count(monkeypatch: pytest.MonkeyPatch) -> None:
    twice = {"mean": 1, "sum": 2}  # what two processes with the same rows give
    monkeypatch.setattr(
        uniform_check, "reduce", lambda value, reduction="mean": twice[reduction] * value
    )
    found, (said,) = compared(monkeypatch, [[20.0] * 4, [20.0] * 4])
    assert not found
    assert "loss 2.0000 and 2.0000 nats per token" in said
    assert "by 8 rows" in said


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
        trainer_fields={"eval_dataset": toy_text(8), **({} if stock else config)},
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
def test_an_evaluation_before_the_first_step_is_not_compared(
    stock: bool, tmp_path: Path, monkeypatch: Any
) -> None:
    compared: list[int] = []
    monkeypatch.setattr(
        "moeadapt.training.session.compare_with_uniform",
        lambda *_: compared.append(trainer.state.global_step) or True,
    )
    option = {"compare_uniform": True}
    trainer = make_trainer(
        "SFT", tmp_path, stock=stock, max_steps=2, eval_strategy="steps", eval_steps=1,
        eval_on_start=True, callbacks=[MoeAdaptCallback(**option)] if stock else [],
        trainer_fields={"eval_dataset": toy_text(8), **({} if stock else option)},
    )  # fmt: skip
    trainer.train()
    assert compared == [1, 2]


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
