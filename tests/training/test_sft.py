"""Ways to feed and continue SFT."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from moeadapt import MoeAdaptCallback, collect_routing
from tests.toy import toy_chat, toy_text
from tests.training.kit import make_trainer, parameters


def finite_logs(trainer: Any) -> list[dict[str, float]]:
    """Train, and return the logs of the loss once every number in them is finite."""
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs
    assert all(math.isfinite(value) for log in logs for value in log.values())
    return logs


@pytest.mark.filterwarnings("ignore:.*(packing|[Pp]adding-free).*")
@pytest.mark.parametrize("packing", [False, True])
def test_rows_without_padding_train(packing: bool, tmp_path: Path) -> None:
    args = (
        {"packing": True, "max_length": 24}
        if packing
        else {"padding_free": True, "max_length": None}
    )
    logs = finite_logs(make_trainer("SFT", tmp_path, rows=toy_text(40), **args))
    assert all(log["moe/active_experts"] == 2 for log in logs)


def test_padding_free_counts_every_token_and_padding_is_never_counted(tmp_path: Path) -> None:
    rows, args = toy_text(2), {"max_steps": 1, "max_length": None}
    padded = finite_logs(make_trainer("SFT", tmp_path, rows=rows, **args))[0]
    free = finite_logs(make_trainer("SFT", tmp_path, rows=rows, padding_free=True, **args))[0]
    # Without flash attention the rows see each other, so only the number of tokens must agree.
    assert padded["num_tokens"] == free["num_tokens"]
    assert padded["moe/active_experts"] == free["moe/active_experts"]


def test_only_the_assistant_is_learned_but_every_token_is_routed(tmp_path: Path) -> None:
    trainer = make_trainer("SFT", tmp_path, rows=toy_chat(), assistant_only_loss=True, max_steps=2)
    (inputs, *_) = list(trainer.get_train_dataloader())
    assert (inputs["labels"] == -100).sum() > (inputs["attention_mask"] == 0).sum()
    with collect_routing(trainer.model) as routings, torch.no_grad():
        trainer.model(**inputs)
    routing = next(iter(routings.values()))[0]
    assert routing.token_mask.sum() == inputs["attention_mask"].sum()
    finite_logs(trainer)


@pytest.mark.parametrize("stock", [False, True])
def test_resuming_gives_the_bits_of_the_uninterrupted_run(stock: bool, tmp_path: Path) -> None:
    def run(**args: Any) -> Any:
        callbacks = [MoeAdaptCallback()] if stock else []
        config = {"save_strategy": "steps", "save_steps": 2, **args}
        return make_trainer("SFT", tmp_path, stock=stock, callbacks=callbacks, **config)

    whole = run()
    whole.train()
    expected = parameters(whole.model, adapter=True)
    resumed = run(save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    found = parameters(resumed.model, adapter=True)
    assert resumed.state.global_step == 4
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    logs = [log for log in whole.state.log_history if "loss" in log]
    again = [log for log in resumed.state.log_history if "loss" in log]
    assert [log["moe/aux_loss"] for log in again] == [log["moe/aux_loss"] for log in logs]
