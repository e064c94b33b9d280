"""One process of the two-process run: the stock Trainer of transformers, no TRL.

Run as `python -m tests.training.worker FOLDER` with the environment of a distributed launch.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from moeadapt.routers import Router
from moeadapt.training.callback import MoeAdaptCallback
from moeadapt.training.mixin import MoETrainerMixin
from tests.tiny import adapt, moe_config, tiny

KINDS = ("mixin", "callback")


class MoETrainer(MoETrainerMixin, Trainer):
    """The mixin over a trainer that is not TRL's."""


def rows() -> list[dict[str, list[int]]]:
    """Return 16 rows of different lengths."""
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(3, 128, (4 + i % 5,), generator=generator).tolist()}
        for i in range(16)
    ]


def collate(examples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Pad on the right."""
    ids = [torch.tensor(example["input_ids"]) for example in examples]
    padded = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-100)
    real = padded != -100
    return {
        "input_ids": padded.masked_fill(~real, 0),
        "attention_mask": real.long(),
        "labels": padded,
    }


def cast_model() -> PeftModel:
    """Return a model whose routers were cast to bfloat16 through `.data`."""
    config = moe_config(
        "block",
        target_modules=["gate_proj", "up_proj", "down_proj"],
        balance={"switch": 0.5, "z_loss": 0.1},
    )
    model = adapt(tiny("llama"), config)
    cast_routers(model)
    return model


def cast_routers(model: nn.Module) -> None:
    """Cast the routers in the one way that they cannot notice."""
    for module in model.modules():
        if isinstance(module, Router):
            for parameter in module.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)


class CastLate(TrainerCallback):
    """Casts the routers when DDP has already been built."""

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        assert model is not None
        cast_routers(model)


def make(kind: str, folder: Path, **fields: Any) -> Trainer:
    """Make a trainer for three optimizer steps of four rows in all, logged together."""
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        learning_rate=0.05,
        optim="sgd",
        logging_steps=3,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        seed=0,
        disable_tqdm=True,
        **{"per_device_train_batch_size": 2, **fields},
    )
    cls = MoETrainer if kind == "mixin" else Trainer
    callbacks = [MoeAdaptCallback()] if kind == "callback" else []
    return cls(cast_model(), args, collate, train_dataset=rows(), callbacks=callbacks)


def train(kind: str, folder: Path, **fields: Any) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Train; return the logged metrics and the adapter."""
    trainer = make(kind, folder, **fields)
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if "loss" in log]
    named = trainer.model.named_parameters()
    adapter = {n: p.detach().clone() for n, p in named if "moeadapt_" in n}
    return {key: value for key, value in log.items() if key.startswith("moe/")}, adapter


def late_callback_error(folder: Path) -> str:
    """Add the callback when the routers can no longer be repaired; return what it says."""
    trainer = make("stock", folder, ddp_backend="gloo")
    trainer.add_callback(CastLate())
    trainer.add_callback(MoeAdaptCallback())
    try:
        trainer.train()
    except RuntimeError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    """Train every kind and write what each process saw."""
    torch.set_num_threads(1)
    found = {kind: train(kind, folder / kind, ddp_backend="gloo") for kind in KINDS}
    assert torch.distributed.get_world_size() == 2
    rank = torch.distributed.get_rank()
    torch.save({k: adapter for k, (_, adapter) in found.items()}, folder / f"adapters-{rank}.pt")
    report: dict[str, Any] = {kind: metrics for kind, (metrics, _) in found.items()}
    report["late"] = late_callback_error(folder / "late")
    report["trl"] = "trl" in sys.modules
    (folder / f"report-{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
