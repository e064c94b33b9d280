"""Small runs of TRL's trainers, shared by the tests of this folder."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, TrainerCallback

from moeadapt import MoeLoraConfig
from moeadapt.training import trainers
from tests.tiny import moe_config, tiny
from tests.toy import toy_labelled, toy_preferences, toy_prompts, toy_text, toy_tokenizer

TOKENIZER = toy_tokenizer()

MLP = ["gate_proj", "up_proj", "down_proj"]

NAMES = ("SFT", "DPO", "KTO", "GRPO", "RLOO", "Reward")

GENERATION = {"num_generations": 2, "max_completion_length": 4}

ROWS: dict[str, Callable[[], Dataset]] = {
    "SFT": toy_text,
    "DPO": toy_preferences,
    "KTO": toy_labelled,
    "GRPO": toy_prompts,
    "RLOO": toy_prompts,
    "Reward": toy_preferences,
}

EXTRA_ARGS: dict[str, dict[str, Any]] = {
    "SFT": {"max_length": 32},
    "GRPO": {**GENERATION, "beta": 0.04},
    "RLOO": GENERATION,
}


def moe(**overrides: Any) -> MoeLoraConfig:
    """Return a config with one router per FFN and two balance losses that matter."""
    fields = {
        "target_modules": MLP,
        "balance": {"switch": 0.5, "z_loss": 0.1},
        "init_lora_weights": True,
    }
    return moe_config("block", **{**fields, **overrides})


def length_reward(completions: list[Any], **columns: Any) -> list[float]:
    """Reward long answers."""
    return [float(len(completion)) for completion in completions]


def arguments(name: str, folder: Path, **overrides: Any) -> Any:
    """Return TRL's config of `name` for four steps of two rows on the CPU."""
    fields: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "seed": 0,
        "disable_tqdm": True,
        **EXTRA_ARGS.get(name, {}),
    }
    return getattr(trl, f"{name}Config")(**{**fields, **overrides})


def base_model(name: str) -> nn.Module:
    """Return a tiny base model with the head that `name` needs."""
    if name == "Reward":
        return tiny("llama", auto=AutoModelForSequenceClassification, num_labels=1)
    return tiny("llama")


def make_trainer(
    name: str,
    folder: Path,
    *,
    stock: bool = False,
    cls: type | None = None,
    model: nn.Module | None = None,
    rows: Any = None,
    config: MoeLoraConfig | None = None,
    callbacks: list[TrainerCallback] | None = None,
    trainer_fields: dict[str, Any] | None = None,
    **args: Any,
) -> Any:
    """Make our trainer of `name`, or TRL's own with `stock`, or a `cls`."""
    ours = getattr(trainers, f"MoE{name}Trainer")
    cls = cls or (getattr(trl, f"{name}Trainer") if stock else ours)
    if config is None and name == "Reward":
        config = moe(task_type="SEQ_CLS", modules_to_save=["score"])
    fields = dict(trainer_fields or {})
    if name in ("GRPO", "RLOO"):
        fields["reward_funcs"] = length_reward
    wrapped = model is not None and hasattr(model, "peft_config")
    torch.manual_seed(0)
    return cls(
        model=model if model is not None else base_model(name),
        args=arguments(name, folder, **args),
        train_dataset=rows if rows is not None else ROWS[name](),
        processing_class=TOKENIZER,
        peft_config=None if wrapped else (config or moe()),
        callbacks=callbacks or [],
        **fields,
    )


def parameters(model: nn.Module, *, adapter: bool) -> dict[str, Tensor]:
    """Return copies of the adapter's parameters, or of the base model's."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if ("moeadapt_" in name) == adapter and "modules_to_save" not in name
    }


def routers_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the router parameters of the trained adapter."""
    named = model.named_parameters()
    return {n: p for n, p in named if "moeadapt_router.default" in n}


class GradientProbe(TrainerCallback):
    """Copies every gradient right before each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        assert model is not None
        named = model.named_parameters()
        self.steps.append({n: p.grad.clone() for n, p in named if p.grad is not None})


def assert_same_gradients(mine: GradientProbe, theirs: GradientProbe, **tolerance: Any) -> None:
    """Compare two runs, step by step and parameter by parameter."""
    assert len(mine.steps) == len(theirs.steps) > 0
    for step, (left, right) in enumerate(zip(mine.steps, theirs.steps, strict=True)):
        assert left.keys() == right.keys()
        for name in left:
            torch.testing.assert_close(
                left[name],
                right[name],
                msg=lambda m, n=name, s=step: f"step {s} {n}: {m}",
                **tolerance,
            )


def run_two(module: str, folder: Path) -> None:
    """Run `python -m module folder` in two processes of one gloo world, and wait for both."""
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", module, str(folder)],
            cwd=Path(__file__).parents[2],
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=180)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
