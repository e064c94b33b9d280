"""What a trainer does to a model with routers, shared by the mixin and the callback."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, reduce
from torch import Tensor, nn
from transformers.modeling_utils import unwrap_model

from moeadapt.errors import ConfigError, TrainingError
from moeadapt.routers import Router
from moeadapt.training.health import RouterHealth
from moeadapt.training.metrics import router_metrics, schedule_metrics
from moeadapt.training.param_groups import RouterOptions
from moeadapt.training.router_step import RouterStep, attach_optimizer
from moeadapt.training.sharding import OWN_STEP, SHARDED, check_edits, check_sharding
from moeadapt.training.uniform_check import compare_with_uniform
from moeadapt.tuner.context import RoutingContext, find_context
from moeadapt.tuner.inspect import (
    after_optimizer_step,
    balance_of,
    heads_of,
    pop_router_stats,
    prepare_stats,
    router_counts,
    set_router_counts,
    step_schedule,
)


class Session:
    """One training run of one model, from the first step to the last.

    Attributes:
        skipped_steps: optimizer steps that a GradScaler skipped: schedules do not count them.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        optimizer: torch.optim.Optimizer,
        options: RouterOptions,
        *,
        compare_uniform: bool = False,
        keeps_counts: bool = False,
    ) -> None:
        """Make the counters, forget what was counted before, and attach to the optimizer.

        Args:
            model: the model.
            device: where it computes.
            optimizer: the trainer's.
            options: what is different for routers.
            compare_uniform: see `after_evaluation`.
            keeps_counts: whether an optimizer step may be skipped, by a GradScaler or on purpose.

        Raises:
            ConfigError: the model has no mixture of LoRA experts.
            TrainingError: routers cannot be treated separately in this setup.
        """
        self.model = model
        self._device = device
        self._step = 0
        self.skipped_steps = 0
        self._amp_scale = 1.0
        self._keeps_counts = keeps_counts
        self._counts_before: dict[str, Tensor] | None = None
        self._health = RouterHealth()
        self._steps_since_log = 0
        self._compare_uniform = compare_uniform
        self.context = require_adapter(model)
        prepare_stats(model, device)
        pop_router_stats(model)
        heads = heads_of(model)
        for head in heads.values():
            head.followed_step = None
        schedules = [head.schedule for head in heads.values() if head.schedule is not None]
        acts = options.own_group or any(schedule.acts_on_optimizer for schedule in schedules)
        check_sharding(acts, options.max_grad_norm is not None)
        check_edits(heads)
        self._attached: RouterStep | None = None
        if AcceleratorState().distributed_type not in OWN_STEP:
            self._attached = attach_optimizer(
                model,
                optimizer,
                router_learning_rate=options.learning_rate,
                router_weight_decay=options.weight_decay,
                router_max_grad_norm=options.max_grad_norm,
            )

    def start_step(self, step: int) -> None:
        """Use the schedule's values of the trainer's optimizer step `step`, counted from 0."""
        self._step = step - self.skipped_steps
        step_schedule(self.model, self._step)
        if self._keeps_counts and self._counts_before is None:
            self._counts_before = router_counts(self.model)

    def set_scale(self, scaler: Any, accumulation_steps: int) -> None:
        """Tell the auxiliary losses what the task loss of this micro-batch is multiplied by.

        Args:
            scaler: a GradScaler, or None; it counts only while enabled.
            accumulation_steps: micro-batches of this optimizer step.
        """
        self._amp_scale = _amp_scale(scaler)
        self.context.set_scale(self._amp_scale / max(accumulation_steps, 1))

    def was_skipped(self, optimizer: Any, scaler: Any) -> bool:
        """Return whether the GradScaler skipped the optimizer step, and let the trainer know.

        accelerate does not notice it with a fused optimizer, which looks after it in its own
        kernel, and the schedule of the learning rate would go on. A smaller scale tells.
        """
        if getattr(optimizer, "step_was_skipped", False):
            return True
        skipped = _amp_scale(scaler) < self._amp_scale
        if skipped and hasattr(optimizer, "_is_overflow"):
            optimizer._is_overflow = True
        return skipped

    def metrics(self) -> dict[str, float]:
        """Return `router_metrics` since the last call, over all processes; each must call it.

        Warns of routers that go wrong, see `RouterHealth`.
        """
        stats = pop_router_stats(self.model, reduce=_sum_over_processes)
        heads = heads_of(self.model)
        self._health.observe(stats, heads, self._steps_since_log)
        self._steps_since_log = 0
        routers = {name: head.router for name, head in heads.items()}
        metrics = router_metrics(stats, balance_of(self.model), routers)
        return metrics | schedule_metrics([heads[name] for name in stats])

    def after_step(self) -> None:
        """Run what follows an optimizer step, over all processes; each must call it."""
        self._counts_before = None
        self._steps_since_log += 1
        after_optimizer_step(self.model, _sum_over_processes, step=self._step)

    def after_skipped_step(self) -> None:
        """Follow an optimizer step that a GradScaler skipped: it counts for nothing."""
        self.skipped_steps += 1
        self.forget_step()

    def forget_step(self) -> None:
        """Take back what was counted in this optimizer step."""
        if self._counts_before is not None:
            set_router_counts(self.model, self._counts_before)
            self._counts_before = None

    def counts(self) -> dict[str, Tensor]:
        """Return the counts since the last log, over all processes; each must call it."""
        heads, own = heads_of(self.model), router_counts(self.model)
        if not heads:
            return {}
        sizes = [head.packed_size for head in heads.values()]
        parts = [
            own.get(name, torch.zeros(size, device=self._device))
            for name, size in zip(heads, sizes, strict=True)
        ]
        sums = _sum_over_processes(torch.cat(parts)).split(sizes)
        return {name: counts for name, counts in zip(heads, sums, strict=True) if name in own}

    def go_on(self, skipped_steps: int, counts: Mapping[str, Tensor]) -> None:
        """Go on from an earlier session.

        Args:
            skipped_steps: of that session.
            counts: what its `counts` returned; for one process, the others start without.
        """
        self.skipped_steps = skipped_steps
        set_router_counts(self.model, counts)

    def after_evaluation(self, batches: Iterable[Any]) -> None:
        """Compare learned routing with equal shares, if asked to; warns once in a run.

        Every process must call it, with the batches of its evaluation.

        Raises:
            TrainingError: see `compare_with_uniform`.
        """
        if self._compare_uniform:
            model = unwrap_model(self.model)
            self._compare_uniform = compare_with_uniform(model, batches, self._device)

    def end(self) -> None:
        """Withdraw scale, schedule and hooks, so that another training loop is noticed again."""
        step_schedule(self.model, None)
        if self._attached is not None:
            self._attached.remove()
        self.context.set_scale(1.0)
        self.context.scale_is_set = False


def require_adapter(model: nn.Module) -> RoutingContext:
    """Return the context of `model`, in any wrapper.

    Raises:
        ConfigError: the model has no mixture of LoRA experts.
    """
    context = find_context(model)
    if context is None:
        raise ConfigError(
            f"this {type(model).__name__} has no mixture of LoRA experts to train; give the "
            "trainer peft_config=MoeLoraConfig(...), or a model from get_peft_model(model, "
            "MoeLoraConfig(...)) or PeftModel.from_pretrained(..., is_trainable=True)"
        )
    return context


def check_setup(model: nn.Module, num_gpus: int) -> None:
    """Refuse setups that would train something else than was asked for.

    Args:
        model: the model, unwrapped.
        num_gpus: GPUs of this one process.

    Raises:
        TrainingError: DataParallel, or fp16 under DeepSpeed.
    """
    state = AcceleratorState()
    if num_gpus > 1 and not getattr(model, "is_loaded_in_8bit", False):
        raise TrainingError(
            f"one process sees {num_gpus} GPUs, which makes the trainer use DataParallel, and "
            "routers cannot be replicated that way; start one process per GPU (torchrun or "
            "accelerate launch), or set CUDA_VISIBLE_DEVICES to one GPU"
        )
    if state.distributed_type == DistributedType.DEEPSPEED and state.mixed_precision == "fp16":
        raise TrainingError(
            "fp16 under DeepSpeed multiplies the task loss by a scale that the auxiliary losses of "
            "the routers cannot read; use bf16"
        )


def restore_routers(model: nn.Module, *, wrapped: bool = False) -> None:
    """Put router parameters back to float32 if someone cast them through `.data`.

    TRL casts every trainable parameter of a quantised model to bfloat16, where small updates of a
    router are lost. The parameter objects stay, so an optimizer keeps them. Sharded parameters are
    left alone.

    Args:
        model: the model.
        wrapped: whether DDP may already be around it; a new dtype gives the parameter a new
            gradient accumulator without DDP's hook, and the processes would drift apart.

    Raises:
        TrainingError: it is too late to do so.
    """
    state = AcceleratorState()
    if state.distributed_type in SHARDED:
        return
    low = [
        parameter
        for module in model.modules()
        if isinstance(module, Router)
        for parameter in module.parameters()
        if parameter.dtype in (torch.float16, torch.bfloat16)
    ]
    if low and wrapped and state.num_processes > 1:
        raise TrainingError(
            f"the routers were cast to {low[0].dtype} and are already inside a distributed "
            "wrapper; give MoeAdaptCallback() to the trainer's constructor, "
            "callbacks=[MoeAdaptCallback()], instead of adding it later"
        )
    for parameter in low:
        parameter.data = parameter.data.float()


def _amp_scale(scaler: Any) -> float:
    return scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0


def _sum_over_processes(packed: Tensor) -> Tensor:
    return reduce(packed, reduction="sum")  # type: ignore[return-value]
