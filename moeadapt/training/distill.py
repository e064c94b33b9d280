"""One plain LoRA trained on the logits of a mixture, with the base in memory once.

Letters: B rows, S tokens of a row, V vocabulary.

Source: Hinton et al. 2015, https://arxiv.org/abs/1503.02531, section 2 (soft targets with a
temperature, the loss times its square); as the second step after gathering the experts: Xue et al.
2022 (OneS), https://arxiv.org/abs/2201.10890. We differ: the loss is the divergence from the
teacher alone, at the tokens that have a label.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import trl
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F

from moeadapt.errors import ConfigError
from moeadapt.hidden_folder import check_folder
from moeadapt.tuner.layer import MoeLoraLinear
from moeadapt.tuner.plain import Pair, adapter_config, adapter_layers, plain_lora, save_plain
from moeadapt.tuner.probe import IGNORED, Batch, Loss, evaluating, measure_loss, read_batches

TRAINING_ROWS = 128
"""Training rows that the divergence is measured on at most where no rows are held out."""


@dataclass(frozen=True, kw_only=True)
class DistillResult:
    """A plain LoRA that was trained to answer as a mixture does.

    Attributes:
        model: the LoRA as a PEFT model, over the same base tensors as the mixture.
        divergence: KL(mixture || LoRA) after training, at temperature 1, in nats per labelled
            token, over the held-out rows; where none were held out, over the first
            `TRAINING_ROWS` training rows.
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
            teacher: gives the logits; on the trainer's device and in eval mode from now on.
            temperature: both logits are divided by it, > 0; above 1 weighs unlikely tokens more.
            kw: the trainer's own.

        Raises:
            ConfigError: `temperature` is not positive.
        """
        if not temperature > 0:
            raise ConfigError(f"temperature={temperature!r} must be positive")
        super().__init__(*args, **kw)
        self.teacher = teacher.to(self.args.device).eval()
        self.temperature = temperature

    def first_batches(self, rows: int) -> Iterator[Batch]:
        """Yield the first `rows` training rows as the trainer reads them, unshuffled."""
        collate = self._get_collator_with_removed_columns(self.data_collator)
        data: Any = self.train_dataset
        first, size = iter(islice(data, rows)), self.args.per_device_train_batch_size
        while own := list(islice(first, size)):
            inputs = dict(collate(own))
            labels = inputs.pop("labels")
            yield Batch(inputs=inputs, labels=labels)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """See `transformers.Trainer.compute_loss`; `num_items_in_batch` counts labels."""
        labels = inputs["labels"]
        asked = {k: v for k, v in inputs.items() if k != "labels"}
        with torch.no_grad():
            wanted = self.teacher(**asked, use_cache=False).logits
        outputs = model(**asked, use_cache=False)
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
        ConfigError: a setting is wrong, the model has no such adapter, no token of `held_out` (or
            of the first training rows) has a label, or `out_dir` is occupied or its disk too full.
        ExportError: `out_dir` was taken while it was written.
    """
    adapter_config(model, adapter)
    if out_dir is not None:
        check_folder(out_dir)
    if rank is not None and (rank < 1 or student is not None):
        raise ConfigError(f"rank={rank} must be at least 1, and goes without student=")
    held = None
    if held_out is not None:
        held = read_batches(held_out, tokenizer=tokenizer, domains=held_out_domains)
    teacher: Any = model
    with _as_it_was(teacher):
        lora: Any = _fresh(teacher, adapter, rank) if student is None else student
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
        probe = list(trainer.first_batches(TRAINING_ROWS)) if held is None else held
        _check_labels(probe, "the first training rows" if held is None else "held_out")
        trainer.train()
        lora = trainer.accelerator.unwrap_model(trainer.model).eval()
        if out_dir is not None and trainer.is_world_process_zero():
            save_plain(lora, Path(out_dir))
        return DistillResult(
            model=lora,
            divergence=measure_divergence(lora, teacher, probe),
            out_dir=None if out_dir is None else Path(out_dir),
            **({} if held is None else _losses(teacher, lora, held)),
        )


def measure_divergence(student: nn.Module, teacher: nn.Module, batches: Iterable[Batch]) -> float:
    """Return KL(teacher || student) in eval mode, at temperature 1, in nats per labelled token.

    Args:
        student: gives logits [rows, tokens, vocabulary].
        teacher: gives logits of the same shape.
        batches: what both are called with; its labels say which tokens count.

    Raises:
        ConfigError: no token has a label.
    """
    batches = list(batches)
    _check_labels(batches, "the data")
    total, tokens = 0.0, 0
    with evaluating(student), evaluating(teacher):
        for batch in batches:
            mine, theirs = _answer(student, batch.inputs), _answer(teacher, batch.inputs)
            labels = batch.labels.to(mine.device)
            total += float(divergence(mine, theirs.to(mine.device), labels))
            tokens += int((labels[:, 1:] != IGNORED).sum())
    return total / tokens


def _answer(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    device = next(model.parameters()).device
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    return model(**moved, use_cache=False).logits


def _check_labels(batches: Sequence[Batch], where: str) -> None:
    if not any((batch.labels[:, 1:] != IGNORED).any() for batch in batches):
        raise ConfigError(
            f"no token of {where} has a label to compare answers at; give longer rows, or a larger "
            "max_length where it cuts off all that follows the prompts"
        )


def _losses(model: PeftModel, lora: PeftModel, batches: Sequence[Batch]) -> dict[str, Any]:
    with lora.disable_adapter():
        base = measure_loss(lora, batches)
    found = {"mixture": measure_loss(model, batches), "merged": measure_loss(lora, batches)}
    return {**found, "base": base}


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Give every module its mode and every parameter its `requires_grad` back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


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
