"""Short runs that save a checkpoint at each step, and faults that strike at a given one."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from tests.toy import toy_text
from tests.training.kit import make_trainer, moe, parameters

DRIFTING = {
    "router": {"name": "top_k", "k": 2, "init_std": 0.5, "noise": "gaussian"},
    "balance": {"loss_free": {"rate": 0.01}, "switch": 0.1},
    "schedule": {"temperature": {"start": 2.0, "end": 1.0, "steps": 6}},
    "lora_dropout": 0.1,
}
"""An adapter with everything that changes while it trains: noise, dropout, bias, schedule."""


def run(folder: Path, *, saves: bool = True, fields: Any = None, **overrides: Any) -> Any:
    """Make a trainer of five steps over two epochs, with a checkpoint at each step."""
    args: dict[str, Any] = {"max_steps": 5, "rows": toy_text(6), "logging_steps": 2}
    args |= {"save_strategy": "steps" if saves else "no", "save_steps": 1}
    return make_trainer("SFT", folder, trainer_fields=fields or {}, **{**args, **overrides})


def adapter(trainer: Any) -> dict[str, Tensor]:
    """Return copies of the adapter's parameters and buffers."""
    named = parameters(trainer.model, adapter=True)
    buffers = {n: b.detach().clone() for n, b in trainer.model.named_buffers() if "moeadapt_" in n}
    return named | buffers


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Compare bit by bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def names(folder: Path) -> list[str]:
    """Return what is in a folder, hidden names included."""
    return sorted(path.name for path in folder.iterdir())


def hidden(folder: Path) -> list[str]:
    """Return what an unfinished save would leave in a run's folder."""
    return [path.name for path in folder.rglob("*partial*")]


def copy_run(source: Path, target: Path) -> Path:
    """Copy a run's folder, so that a test may damage it."""
    shutil.copytree(source, target)
    return target


class At(TrainerCallback):
    """Does something once, at an event of the given step (counted from 1)."""

    def __init__(self, event: str, step: int, act: Callable[..., None]) -> None:
        def strike(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now = state.global_step + (0 if event in ("on_step_end", "on_save") else 1)
            if now == step:
                act(**kwargs)

        setattr(self, event, strike)


def poison(model: nn.Module, name: str) -> None:
    """Make one value of the first parameter whose name contains `name` NaN."""
    with torch.no_grad():
        parameter = next(p for n, p in model.named_parameters() if name in n)
        parameter.view(-1)[0] = float("nan")


@contextmanager
def bad_loss(trainer: Any, step: int, value: float) -> Iterator[None]:
    """Let the loss of one optimizer step be `value`, gradients included."""
    original = trainer.compute_loss

    def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(model, inputs, *args, **kwargs)
        return found * value if trainer.state.global_step + 1 == step else found

    trainer.compute_loss = compute_loss
    yield
    del trainer.compute_loss


__all__ = ["DRIFTING", "At", "moe"]
