"""`SafeRunMixin`: a training run that stops cleanly at a fault and goes on from where it was."""

import pickle
import warnings
from collections.abc import Iterator, Mapping, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainingArguments

from moeadapt.errors import ConfigError, TrainingError, TrainingStopped
from moeadapt.training.checkpoint_files import OPTIMIZER, SCALER, SCHEDULER, read_marker
from moeadapt.training.checkpoint_mixin import CheckpointMixin
from moeadapt.training.memory import explain_memory, is_out_of_memory
from moeadapt.training.nonfinite import NonfiniteGuard, first_nonfinite_router, is_without_target
from moeadapt.training.output_folder import alone_in, check_output_dir
from moeadapt.training.resume import (
    check_checkpoint,
    find_checkpoint,
    last_complete,
    refuse_changes,
)
from moeadapt.training.run_facts import changed_adapter, changed_facts, changed_length, run_facts
from moeadapt.training.stop_signals import StopSignals


class SafeRunMixin(CheckpointMixin):
    """What a run does about faults; see `docs/faults.md`.

    1. `__init__`: the output folder can be written, before anything is loaded into it.
    2. `train`: alone in its folder; resumes only from a complete checkpoint of the same run.
    3. `training_step`: a batch without labels costs nothing, memory that lacks is explained.
    4. Before each optimizer step: NaN and infinity stop the run or skip the step.
    5. After each optimizer step, and at the end of an epoch: SIGTERM and SIGINT save a checkpoint
       and stop the run.
    """

    def __init__(
        self,
        *args: Any,
        on_nonfinite: str = "stop",
        allow_partial_resume: bool = False,
        **kwargs: Any,
    ) -> None:
        """Pass everything on to the trainer; see `MoETrainerMixin`."""
        self._guard = NonfiniteGuard(on_nonfinite)
        self._signals = StopSignals()
        self._stopping = False
        self._allow_partial = allow_partial_resume
        self._facts: dict[str, Any] = {}
        self._resumed: Path | None = None
        self._told_of_no_target = False
        for value in (*args, *kwargs.values()):
            if isinstance(value, TrainingArguments) and value.should_save:
                check_output_dir(value.output_dir or "trainer_output")
        super().__init__(*args, **kwargs)
        self.add_callback(_Events(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kw: Any) -> Any:
        """See `transformers.Trainer.train`.

        Raises:
            ConfigError: there is no training data, or no checkpoint to resume from.
            TrainingError: see `find_checkpoint`, `alone_in` and `NonfiniteGuard`; memory lacks, or
                a checkpoint cannot be written.
            TrainingStopped: after SIGTERM or SIGINT, and a complete checkpoint.
        """
        rows = self.train_dataset
        if isinstance(rows, Sized) and len(rows) == 0:
            raise ConfigError(
                "the training data has no rows, or none is left that has a label; check the "
                "columns, the masks and max_length"
            )
        self._guard = NonfiniteGuard(self._guard.policy)
        self._told_of_no_target = self._stopping = False
        routers = getattr(self, "_router_options", {})
        self._facts = run_facts(self.args, rows) | {f"router_{k}": v for k, v in routers.items()}
        with self._alone(), self._signals.listen():
            self._resumed = self._choose(resume_from_checkpoint)
            resumed = None if self._resumed is None else str(self._resumed)
            try:
                result = super().train(resumed, *args, **kw)
            except pickle.UnpicklingError as error:
                raise TrainingError(
                    f"{resumed} holds more than tensors and plain data; it is refused, and nothing "
                    "of it was run"
                ) from error
            finally:
                self.is_in_train = False
        if self._stopping:
            raise TrainingStopped(self._farewell(), self._signals.exit_code)
        if self._signals.received is not None:
            # No checkpoint follows any more: only the caller can save these weights.
            warnings.warn(
                "a signal came when the last epoch was over: the run is complete, and train "
                "returns as without one, so that the model is saved",
                stacklevel=2,
            )
        return result

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self.args.should_save:
            yield
            return
        with alone_in(self.args.output_dir or "."):
            yield

    def _choose(self, wanted: str | bool | None) -> Path | None:
        """Return the checkpoint to go on from, of this very run."""
        if not wanted:
            return None
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        world = self.args.world_size
        needs = [f"rng_state_{i}.pth" for i in range(world)] if world > 1 else ["rng_state.pth"]
        needs += [] if sharded else [OPTIMIZER, SCHEDULER]
        if self.accelerator.scaler is not None:
            needs.append(SCALER)
        allow = self._allow_partial
        if wanted is True:
            out = self.args.output_dir or "."
            found = find_checkpoint(out, needs=needs, sharded=sharded, allow_partial=allow)
        else:
            found = check_checkpoint(wanted, needs, sharded=sharded, allow_partial=allow)
        adapter = changed_adapter(Path(found), getattr(self.model, "peft_config", {}))
        then = read_marker(found).get("run")
        if not isinstance(then, dict):
            warnings.warn(
                f"{found} does not say with which data, batches, seed and optimizer it was made; "
                "they are not compared with those of this run",
                stacklevel=3,
            )
            then = {}
        run = changed_facts(then, self._facts)
        refuse_changes(found, adapter, run, allow)
        if length := changed_length(then, self._facts):
            warnings.warn(f"going on from {found}: {length}", stacklevel=3)
        return Path(found)

    def checkpoint_facts(self) -> dict[str, Any]:
        """See `CheckpointMixin.checkpoint_facts`."""
        return {"step": self.state.global_step, "run": self._facts}

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """See `transformers.Trainer.training_step`."""
        step = self.state.global_step + 1
        if not self._told_of_no_target and is_without_target(inputs):
            self._told_of_no_target = True
            warnings.warn(
                f"no token of a batch of optimizer step {step} has a label to predict: its loss "
                "is 0 and teaches nothing. Rows of one token, masks that cover every answer and a "
                "max_length that cuts the answers off do this; said once per run",
                stacklevel=2,
            )
        if num_items_in_batch is not None:
            # Without a label the loss is 0 / 0; of 0 / 1 the gradient is 0, that of routers stays.
            num_items_in_batch = torch.as_tensor(num_items_in_batch).clamp(min=1)
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or self.args.auto_find_batch_size:
                raise
            model.zero_grad(set_to_none=True)
            self.forget_step()
            raise TrainingError(
                f"out of memory in optimizer step {step}: {str(error).partition(chr(10))[0]} "
                f"{explain_memory(self.args, self.model, inputs)} The weights are those of step "
                f"{step - 1}; {self._last()}"
            ) from error
        self._guard.observe(loss, lambda: self._first_router(model, inputs))
        finite = not self._guard.seen or self.args.logging_nan_inf_filter
        return loss if finite else torch.zeros_like(loss)

    def _first_router(self, model: nn.Module, inputs: Any) -> str:
        """Say in which router NaN begins, where a forward can be repeated."""
        alone = self.args.world_size == 1 and self._guard.policy == "stop"
        if not alone or not isinstance(inputs, Mapping):
            return ""
        return first_nonfinite_router(
            model, lambda: self.compute_loss(model, self._prepare_inputs(dict(inputs)))
        )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Do no step beyond the last: transformers looks only after one."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Keep the checkpoint of a stopped run: at a limit of 1 transformers leaves the best."""
        limit = self.args.save_total_limit
        self.args.save_total_limit = None if self._stopping else limit
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def before_optimizer_step(self) -> None:
        """Look at losses and gradients of an optimizer step of the trainer."""
        scaler: Any = self.accelerator.scaler
        scaled = scaler is not None and scaler.is_enabled()
        found = self._guard.find(self.model, scaled=scaled, world_size=self.args.world_size)
        if not found:
            return
        # Not TRL's `log`, which would close its window of averages.
        Trainer.log(self, {f"nonfinite_{name}": value for name, value in found.items()})
        self.forget_step()
        try:
            step = self.state.global_step + 1
            self._guard.act(found, self.model, step, scaled=scaled)
        except TrainingError as error:
            raise TrainingError(f"{error}; {self._last()}") from None

    def forget_step(self) -> None:
        """Take back what was counted in an optimizer step that is not done."""

    def stop_if_asked(self, control: TrainerControl) -> None:
        """Follow a signal after an optimizer step, or at the end of an epoch."""
        if self._signals.agreed(self.args.device, self.args.world_size):
            self._stopping = control.should_training_stop = control.should_save = True
            control.should_evaluate = False

    def end_epoch(self, control: TrainerControl) -> None:
        """Save no second time after a signal; follow one that no step has seen, as after the last.

        Of a run that ends here nothing may be saved yet, and its last evaluation can take long.
        """
        if self._stopping:
            control.should_save = control.should_evaluate = False
        else:
            self.stop_if_asked(control)

    def _last(self) -> str:
        last = last_complete(self.args.output_dir or ".")
        return "there is no checkpoint yet" if last is None else f"the last checkpoint is {last}"

    def _farewell(self) -> str:
        step = self.state.global_step
        return (
            f"stopped by a signal after optimizer step {step}; {self._last()}. Go on with "
            "resume_from_checkpoint=last"
        )


class _Events(TrainerCallback):
    """Tells a trainer of the events it has no method for."""

    def __init__(self, trainer: SafeRunMixin) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """See `TrainerCallback.on_pre_optimizer_step`."""
        self._trainer.before_optimizer_step()

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """See `TrainerCallback.on_step_end`."""
        self._trainer.stop_if_asked(control)

    def on_epoch_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """See `TrainerCallback.on_epoch_end`."""
        self._trainer.end_epoch(control)
