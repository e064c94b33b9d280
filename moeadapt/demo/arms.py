"""The four arms of the demo: the same data, steps, targets, learning rate and scale."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from moeadapt.training.trainers import MoESFTTrainer
from moeadapt.tuner.config import MoeLoraConfig

RANK, EXPERTS, K, BATCH = 8, 4, 2, 8
LEARNING_RATE = 1e-3
MAX_LENGTH = 192


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One adapter to compare.

    Attributes:
        name: column of the table.
        folder: where it is saved, below the output folder.
        config: the adapter; targets and scale are the same in every arm.
    """

    name: str
    folder: str
    config: PeftConfig

    @property
    def is_mixture(self) -> bool:
        """Whether the arm has experts."""
        return isinstance(self.config, MoeLoraConfig)


def make_arms() -> list[Arm]:
    """Return the arms: two plain LoRAs to beat, and the two mixtures."""
    return [
        _lora("LoRA, equal active rank", "lora_active", K * RANK),
        _lora("LoRA, equal total rank", "lora_total", EXPERTS * RANK),
        _mixture("mixture per linear", "mixture_linear", placement="linear", router_scope="block"),
        _mixture("mixture on FFN", "mixture_ffn", placement="ffn"),
    ]


def _lora(name: str, folder: str, rank: int) -> Arm:
    config = LoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", r=rank, lora_alpha=2 * rank
    )
    return Arm(name=f"{name} (r={rank})", folder=folder, config=config)


def _mixture(name: str, folder: str, **placement: Any) -> Arm:
    config = MoeLoraConfig(
        task_type="CAUSAL_LM",
        target_modules="all-linear",
        r=RANK,
        lora_alpha=2 * RANK,
        num_experts=EXPERTS,
        router={"name": "top_k", "k": K},
        balance={"switch": 0.01},
        **placement,
    )
    return Arm(name=f"{name} ({EXPERTS}x{RANK}, k={K})", folder=folder, config=config)


class _Report(TrainerCallback):
    """Hands each step's loss to the progress bar."""

    def __init__(self, on_step: Any) -> None:
        self._on_step = on_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self._on_step(state.global_step, logs["loss"])


def train_arm(
    arm: Arm,
    base_path: str,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, str]],
    *,
    steps: int,
    out: Path,
    on_step: Any,
) -> Any:
    """Train one arm and save it; returns the PEFT model."""
    set_seed(0)
    base = load_base(base_path)
    args = SFTConfig(
        output_dir=str(out / arm.folder),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=max(steps // 10, 1),
        max_length=MAX_LENGTH,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        seed=0,
    )
    trainer_class = MoESFTTrainer if arm.is_mixture else SFTTrainer
    trainer = trainer_class(
        model=base,
        args=args,
        train_dataset=Dataset.from_list([_columns(row) for row in rows]),
        processing_class=tokenizer,
        peft_config=arm.config,
        callbacks=[_Report(on_step)],
    )
    trainer.remove_callback(PrinterCallback)  # the progress bar shows the loss
    trainer.train()
    model: Any = trainer.model
    model.save_pretrained(out / arm.folder)
    trainer.save_state()  # the log, which a report draws
    return model


def load_base(path: str) -> PreTrainedModel:
    """Load the base in float32, which every CPU computes fast."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def _columns(row: dict[str, str]) -> dict[str, str]:
    return {"prompt": row["prompt"] + "\n", "completion": row["completion"]}


def seconds_per_step(
    base_path: str, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]]
) -> float:
    """Time the second of two training steps of the largest plain LoRA, to choose the steps."""
    model = get_peft_model(load_base(base_path), make_arms()[1].config)  # type: ignore[arg-type]
    batch = batch_of(tokenizer, rows[:BATCH], model.device)
    return [time_step(model, batch) for _ in range(2)][-1]


def batch_of(
    tokenizer: Any, rows: list[dict[str, str]], device: torch.device
) -> dict[str, torch.Tensor]:
    """Tokenise rows into one right-padded batch with labels on the answers."""
    prompts = [tokenizer(row["prompt"] + "\n").input_ids for row in rows]
    answers = [[*tokenizer(row["completion"]).input_ids, tokenizer.eos_token_id] for row in rows]
    width = min(max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True)), MAX_LENGTH)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        tokens = torch.tensor((prompt + answer)[:width])
        ids[i, : len(tokens)], mask[i, : len(tokens)] = tokens, 1
        labels[i, len(prompt) : len(tokens)] = tokens[len(prompt) :]
    return {
        "input_ids": ids.to(device),
        "attention_mask": mask.to(device),
        "labels": labels.to(device),
    }


def time_step(model: Any, batch: dict[str, torch.Tensor]) -> float:
    """Seconds of one forward and backward."""
    model.train()
    start = time.perf_counter()
    model(**batch).loss.backward()
    if batch["input_ids"].is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    model.zero_grad()
    return seconds
