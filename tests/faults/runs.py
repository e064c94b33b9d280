"""Training runs on the CPU that ought to be one and the same, in one process or in two.

Run as `python -m tests.faults.runs FOLDER`: alone, or in each of two processes of a distributed
launch. Not inside pytest, whose run-time type checks take longer than these tiny models.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PrinterCallback, Trainer, TrainingArguments

import moeadapt
from moeadapt.training.mixin import MoETrainerMixin
from tests.tiny import adapt, labels_of, moe_config, tiny

STEPS, ROWS = 50, 4
"""Optimizer steps, and rows of each."""

MICRO_BATCH_LOSSES = {"switch": 0.5, "z_loss": 0.1}
"""Balance losses; `switch` is a product of means over a micro-batch."""

TOKEN_LOSSES = {"z_loss": 0.1}
"""A mean over tokens: the same for any division into micro-batches of equal size."""

CHECKPOINTED = {"reentrant": True, "non_reentrant": False}

SINGLE: dict[str, dict[str, Any]] = {
    "2x2": {"size": 2, "accumulate": 2},
    "2x2 reentrant": {"size": 2, "accumulate": 2, "checkpointing": "reentrant"},
    "2x2 non_reentrant": {"size": 2, "accumulate": 2, "checkpointing": "non_reentrant"},
    "token 4x1": {"size": 4, "accumulate": 1, "balance": TOKEN_LOSSES},
    "token 2x2": {"size": 2, "accumulate": 2, "balance": TOKEN_LOSSES},
    "token 1x4": {"size": 1, "accumulate": 4, "balance": TOKEN_LOSSES},
}
"""Runs in one process: rows of a micro-batch, micro-batches of a step, and what else differs."""

DOUBLE: dict[str, dict[str, Any]] = {
    "2 x 2x1": {"size": 2, "accumulate": 1},
    "2 x 2x1 reentrant": {"size": 2, "accumulate": 1, "checkpointing": "reentrant"},
    "2 x 2x1 non_reentrant": {"size": 2, "accumulate": 1, "checkpointing": "non_reentrant"},
    "token 2 x 2x1": {"size": 2, "accumulate": 1, "balance": TOKEN_LOSSES},
}
"""Runs in two processes."""


class MoETrainer(MoETrainerMixin, Trainer):
    """The mixin over the stock trainer."""


def build(num_experts: int = 4, **overrides: Any) -> PeftModel:
    """Return a model of one layer with a router per block."""
    fields = {"num_experts": num_experts, "balance": MICRO_BATCH_LOSSES, **overrides}
    fields["target_modules"] = ["gate_proj", "up_proj", "down_proj"]
    return adapt(tiny("llama", num_hidden_layers=1), moe_config("block", **fields)).train()


def rows(count: int = STEPS * ROWS) -> list[dict[str, Tensor]]:
    """Return rows of equal length, which a model can learn something from."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(3, 120, (count,), generator=generator)
    ids = 3 + (starts[:, None] + torch.arange(8)) % 120
    return [
        {"input_ids": row, "labels": row, "attention_mask": torch.ones(8).long()} for row in ids
    ]


def train(
    folder: Path,
    size: int,
    accumulate: int,
    checkpointing: str | None = None,
    model: PeftModel | None = None,
    data: list[dict[str, Tensor]] | None = None,
    **fields: Any,
) -> Trainer:
    """Train and return the trainer.

    Args:
        folder: for the trainer.
        size: rows of a micro-batch of a process.
        accumulate: micro-batches of a step.
        checkpointing: one of `CHECKPOINTED`, or none.
        model: what to train, `build()` if None.
        data: rows, `rows()` if None.
        fields: `balance`, or more of TrainingArguments.
    """
    balance = fields.pop("balance", MICRO_BATCH_LOSSES)
    model = model or build(balance=balance)
    if checkpointing is not None:
        fields["gradient_checkpointing"] = True
        fields["gradient_checkpointing_kwargs"] = {"use_reentrant": CHECKPOINTED[checkpointing]}
    if "RANK" in os.environ:
        fields["ddp_backend"] = "gloo"
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulate,
        **{"max_steps": STEPS, "learning_rate": 3e-3, **fields},
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        seed=0,
        disable_tqdm=True,
    )
    trainer = MoETrainer(model, args, train_dataset=data or rows())
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def found(trainer: Trainer) -> dict[str, Any]:
    """Return the losses of every step, the metrics, and the adapter after the last."""
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return {
        "loss": torch.tensor([log["loss"] for log in logs], dtype=torch.float64),
        "metrics": [{k: v for k, v in log.items() if k.startswith("moe/")} for log in logs],
        "adapter": {
            n: p.detach().clone() for n, p in trainer.model.named_parameters() if "moeadapt_" in n
        },
    }


def same_token(token: int) -> dict[str, Tensor]:
    """Return a row of one token alone: its hidden states, and so its experts, are all alike."""
    ids = torch.full((1, 6), token)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def choices(model: PeftModel, token: int) -> list[frozenset[int]]:
    """Return the experts that a row of `token` uses, per router."""
    with torch.no_grad(), moeadapt.collect_routing(model) as routings:
        model(**same_token(token))
    return [frozenset(r.weights.sum(0).nonzero().flatten().tolist()) for (r,) in routings.values()]


def disjoint_tokens(model: PeftModel) -> tuple[int, int]:
    """Return two tokens whose rows have no expert in common, in any router."""
    seen = {token: choices(model, token) for token in range(3, 60)}
    for a, of_a in seen.items():
        for b, of_b in seen.items():
            if all(not x & y for x, y in zip(of_a, of_b, strict=True)):
                return a, b
    raise AssertionError("every pair of tokens shares an expert")


def gradients(model: Any, token: int) -> dict[str, Tensor]:
    """Back-propagate a row of `token` once."""
    inputs = same_token(token)
    moeadapt.set_aux_loss_scale(model, 1.0)
    model(**inputs, labels=labels_of(inputs)).loss.backward()
    named = {n.removeprefix("module."): p for n, p in model.named_parameters()}
    return {n: p.grad.clone() for n, p in named.items() if p.grad is not None}


def disjoint_rows(model: PeftModel) -> list[dict[str, Tensor]]:
    """Return rows of the two tokens in turns."""
    turns = [same_token(token) for token in disjoint_tokens(model)] * 3
    return [{**{k: v[0] for k, v in row.items()}, "labels": row["input_ids"][0]} for row in turns]


DISJOINT = {"max_steps": 3, "train_sampling_strategy": "sequential"}


def disjoint_model() -> PeftModel:
    """Return a model with one of eight experts per token."""
    return build(num_experts=8, router={"name": "top_k", "k": 1, "init_std": 0.5})


def alone(folder: Path) -> None:
    """Train every run of `SINGLE`, and the one of `together` on both processes' rows."""
    report = {name: found(train(folder / "out", **run)) for name, run in SINGLE.items()}
    model = disjoint_model()
    data = disjoint_rows(model)
    report["disjoint"] = found(train(folder / "out", 1, 2, model=model, data=data, **DISJOINT))
    torch.save(report, folder / "report.pt")


def together(folder: Path) -> None:
    """Train every run of `DOUBLE`, and one whose processes have no expert in common."""
    report: dict[str, Any] = {}
    for name, options in DOUBLE.items():
        report[name] = found(train(folder / "out", **options))
    rank = torch.distributed.get_rank()
    model = disjoint_model()
    tokens = disjoint_tokens(model)
    report["disjoint ddp"] = gradients(DistributedDataParallel(model), tokens[rank])
    fresh = disjoint_model()
    data = disjoint_rows(fresh)
    report["disjoint"] = found(train(folder / "out", 1, 1, model=fresh, data=data, **DISJOINT))
    torch.save(report, folder / f"report-{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    (together if "RANK" in os.environ else alone)(Path(sys.argv[1]))
