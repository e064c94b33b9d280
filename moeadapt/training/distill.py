"""One plain LoRA trained on the logits of a mixture, with the base in memory once.

Letters: B rows, S tokens of a row, V vocabulary.

Source: Hinton et al. 2015, https://arxiv.org/abs/1503.02531, section 2 (soft targets with a
temperature, the loss times its square); as the second step after gathering the experts: Xue et al.
2022 (OneS), https://arxiv.org/abs/2201.10890. We differ: the loss is the divergence from the
teacher alone, at the tokens that have a label.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import trl
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F

from moeadapt.errors import ConfigError
from moeadapt.tuner.layer import MoeLoraLinear
from moeadapt.tuner.plain import (
    Pair,
    adapter_config,
    adapter_layers,
    check_folder,
    plain_lora,
    save_plain,
)
from moeadapt.tuner.probe import IGNORED, Loss, measure_loss, read_batches


@dataclass(frozen=True, kw_only=True)
class DistillResult:
    """A plain LoRA that was trained to answer as a mixture does.

    Attributes:
        model: the LoRA as a PEFT model, over the same base tensors as the mixture.
        divergence: mean KL divergence from the mixture at the end of training, in nats per token.
        mixture: held-out loss of the mixture; None: nothing was held out.
        merged: held-out loss of the LoRA.
        base: held-out loss without an adapter.
        out_dir: the folder it was written to; None: none.
    """

    model: PeftModel
    divergence: float
    mixture: Loss | None = None
    merged: Loss | None = None
    base: Loss | None = None
    out_dir: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON data."""
        losses = {"mixture": self.mixture, "merged": self.merged, "base": self.base}
        return {
            "method": {"name": "distill"},
            "out_dir": None if self.out_dir is None else str(self.out_dir),
            "divergence": self.divergence,
            "losses": {n: loss.to_dict() for n, loss in losses.items() if loss is not None},
            "held_out": self.mixture is not None,
        }


class DistillTrainer(trl.SFTTrainer):
    """TRL's SFT trainer whose loss is the divergence of the student from a teacher."""

    def __init__(self, *args: Any, teacher: nn.Module, temperature: float = 1.0, **kw: Any) -> None:
        """Pass everything else on to the trainer.

        Args:
            args: the trainer's own.
            teacher: gives the logits; in eval mode from now on.
            temperature: both logits are divided by it, > 0; above 1 weighs unlikely tokens more.
            kw: the trainer's own.
        """
        if not temperature > 0:
            raise ConfigError(f"temperature={temperature!r} must be positive")
        super().__init__(*args, **kw)
        self.teacher = teacher.to(self.args.device).eval()
        self.temperature = temperature

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """See `transformers.Trainer.compute_loss`; `num_items_in_batch` counts labels."""
        labels = inputs["labels"]
        asked = {k: v for k, v in inputs.items() if k != "labels"} | {"use_cache": False}
        with torch.no_grad():
            wanted = self.teacher(**asked).logits
        outputs = model(**asked)
        total = divergence(outputs.logits, wanted, labels, self.temperature)
        count: Any = num_items_in_batch
        if count is None:
            count = (labels[:, 1:] != IGNORED).sum()
        loss = total / torch.as_tensor(count, device=total.device).clamp(min=1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss


def divergence(
    logits: Float[Tensor, "B S V"],
    wanted: Float[Tensor, "B S V"],
    labels: Int[Tensor, "B S"],
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """Return the sum over labelled tokens of KL(wanted || logits) times temperature squared.

    Args:
        logits: of the student; those at token t answer for the label at t + 1.
        wanted: of the teacher.
        labels: `IGNORED` where there is no loss.
        temperature: both logits are divided by it.
    """
    kept = labels[:, 1:] != IGNORED
    dtype = torch.promote_types(logits.dtype, torch.float32)
    # Rows first: the softmax of what is ignored is never taken.
    mine = (logits[:, :-1][kept].to(dtype) / temperature).log_softmax(-1)
    theirs = (wanted[:, :-1][kept].to(dtype) / temperature).log_softmax(-1)
    return F.kl_div(mine, theirs, reduction="sum", log_target=True) * temperature**2


def distill(
    model: nn.Module,
    train_dataset: Any,
    *,
    args: Any = None,
    out_dir: str | Path | None = None,
    rank: int | None = None,
    student: PeftModel | None = None,
    temperature: float = 1.0,
    tokenizer: Any = None,
    held_out: Iterable[Any] | None = None,
    held_out_domains: Sequence[str] | None = None,
    adapter: str = "default",
    **trainer_options: Any,
) -> DistillResult:
    """Train one ordinary PEFT LoRA to give the logits of a mixture.

    The student is a second module tree over the tensors of the mixture's base, so the base is in
    memory once. What the mixture trained in full (`modules_to_save`) is in the student, frozen.

    Args:
        model: the PEFT model with the mixture, any router, experts and placement.
        train_dataset: rows as `trl.SFTTrainer` takes them.
        args: a `trl.SFTConfig`.
        out_dir: folder for the adapter, new or empty; None: write nothing.
        rank: rank of the student in every target linear, >= 1; None: that of all experts together.
        student: a plain LoRA to start from instead, such as `moeadapt.merge(...).model`.
        temperature: see `DistillTrainer`.
        tokenizer: of the model; None: the trainer loads it.
        held_out: batches or texts for the losses, see `moeadapt.merge`; None: none.
        held_out_domains: name of the domain of each row of `held_out`.
        adapter: which adapter.
        trainer_options: passed on to the trainer.

    Raises:
        ConfigError: a setting is wrong, or the model has no such adapter.
        ExportError: `out_dir` cannot be written.
    """
    adapter_config(model, adapter)
    if out_dir is not None:
        check_folder(out_dir)
    if rank is not None and (rank < 1 or student is not None):
        raise ConfigError(f"rank={rank} must be at least 1, and goes without student=")
    batches = None
    if held_out is not None:
        batches = read_batches(held_out, tokenizer=tokenizer, domains=held_out_domains)
    teacher: Any = model
    modes = {name: module.training for name, module in model.named_modules()}
    lora: Any = student or _fresh(teacher, adapter, rank)
    _train_lora_only(lora)
    trainer = DistillTrainer(
        lora,
        args=args,
        train_dataset=train_dataset,
        processing_class=tokenizer,
        teacher=teacher,
        temperature=temperature,
        **trainer_options,
    )
    trainer.train()
    lora = trainer.accelerator.unwrap_model(trainer.model).eval()
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    last = history[-1] if history else trainer.state.log_history[-1].get("train_loss", float("nan"))
    if out_dir is not None and trainer.is_world_process_zero():
        save_plain(lora, Path(out_dir))
    losses: dict[str, Loss | None] = {}
    if batches is not None:
        with lora.disable_adapter():
            losses["base"] = measure_loss(lora, batches)
        losses |= {
            "mixture": measure_loss(model, batches),
            "merged": measure_loss(lora, batches),
        }
    for name, module in model.named_modules():
        module.training = modes[name]
    folder = None if out_dir is None else Path(out_dir)
    return DistillResult(model=lora, divergence=last, out_dir=folder, **losses)


def _fresh(model: PeftModel, adapter: str, rank: int | None) -> PeftModel:
    """Return a LoRA that changes nothing yet, as PEFT starts one: random A, zero B."""
    pairs = {
        key: _start(layer, rank or sum(layer.moe_banks[adapter].size.all_ranks))
        for key, layer in adapter_layers(model, adapter).items()
    }
    return plain_lora(model, pairs, adapter=adapter)


def _start(layer: MoeLoraLinear, rank: int) -> Pair:
    rank = min(rank, layer.in_features, layer.out_features)
    device = next(layer.parameters()).device
    a = torch.empty(rank, layer.in_features, device=device)
    nn.init.kaiming_uniform_(a, a=5**0.5)
    return Pair(a=a, b=torch.zeros(layer.out_features, rank, device=device))


def _train_lora_only(student: PeftModel) -> None:
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(".lora_A." in name or ".lora_B." in name)
