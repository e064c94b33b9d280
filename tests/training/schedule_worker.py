"""One process of a two-process run with a schedule and a selection bias.

Run as `python -m tests.training.schedule_worker FOLDER` with the environment of a distributed
launch.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from moeadapt.training.callback import MoeAdaptCallback
from tests.tiny import adapt, moe_config, tiny
from tests.training.kit import MLP
from tests.training.worker import KINDS, MoETrainer, collate, rows

SCHEDULE = {
    "k": {"start": 3, "end": 2, "steps": 2},
    "temperature": {"start": 2.0, "steps": 3},
    "freeze_router_steps": 1,
    "router_warmup_steps": 2,
}


def train(kind: str, folder: Path, **fields: Any) -> dict[str, Tensor]:
    """Train four optimizer steps of four rows in all; return the adapter with its buffers."""
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        learning_rate=0.05,
        optim="sgd",
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        seed=0,
        disable_tqdm=True,
        **{"per_device_train_batch_size": 2, **fields},
    )
    config = moe_config(
        "block",
        target_modules=MLP,
        balance={"switch": 0.5, "loss_free": {"rate": 0.05}},
        schedule=SCHEDULE,
    )
    model = adapt(tiny("llama"), config)
    options = {"router_max_grad_norm": 0.05}
    if kind == "mixin":
        trainer = MoETrainer(model, args, collate, train_dataset=rows(), **options)
    else:
        callbacks = [MoeAdaptCallback(**options)]
        trainer = Trainer(model, args, collate, train_dataset=rows(), callbacks=callbacks)
    trainer.train()
    return {n: t.clone() for n, t in model.state_dict().items() if "moeadapt_" in n}


def main(folder: Path) -> None:
    """Train every kind and write what came out."""
    torch.set_num_threads(1)
    found = {kind: train(kind, folder / kind, ddp_backend="gloo") for kind in KINDS}
    assert torch.distributed.get_world_size() == 2
    torch.save(found, folder / f"adapters-{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
