"""`MoETrainerMixin`: in front of any trainer that derives from `transformers.Trainer`."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from moeadapt.training.checkpoint_files import COUNTS, read_marker
from moeadapt.training.ddp import fit_ddp
from moeadapt.training.hub_push import before_push, kept_card, refuse_token
from moeadapt.training.nonfinite import checked_routers
from moeadapt.training.param_groups import RouterOptions, split_router_params
from moeadapt.training.safe_run import SafeRunMixin
from moeadapt.training.session import Session, check_setup, require_adapter, restore_routers


class MoETrainerMixin(SafeRunMixin):
    """Gives the routers what they need from a trainer; the losses stay the trainer's own.

    1. `train`: routers are float32 again before the optimizer and any wrapper are made.
    2. `training_step`: the schedule's values of this optimizer step, and the scale of the auxiliary
       losses, exact for every micro-batch, the last, shorter accumulation of an epoch included.
    3. In each optimizer step, after the trainer's own clipping: see `router_step`.
    4. After each optimizer step: selection biases, adaptive coefficients and the set of experts.
    5. `log`: `moe/` metrics beside the loss (see `router_metrics`), for every `report_to`. Routers
       that go wrong cause a `RoutingWarning`, each symptom once (see `RouterHealth`).
    6. After each evaluation while training, with `compare_uniform`: see `compare_with_uniform`.
    7. Checkpoints, resuming, NaN, signals, memory: see `SafeRunMixin`.

    Raises:
        ConfigError: the model has no mixture of LoRA experts, the output folder cannot be written,
            or an option is unknown; in `train`, see `RouterOptions` and `SafeRunMixin`.
        TrainingError: in `train`, see `check_setup`, `Session`, `compare_with_uniform` and
            `SafeRunMixin`.
        TrainingStopped: in `train`, after SIGTERM or SIGINT, and a complete checkpoint.

    Example:
        >>> class MoESFTTrainer(MoETrainerMixin, trl.SFTTrainer): ...
        >>> MoESFTTrainer(model, train_dataset=rows, peft_config=MoeLoraConfig()).train()
    """

    def __init__(
        self,
        *args: Any,
        router_learning_rate: float | None = None,
        router_weight_decay: float | None = None,
        router_max_grad_norm: float | None = None,
        compare_uniform: bool = False,
        check_routers: bool = False,
        **kwargs: Any,
    ) -> None:
        """Pass everything on to the trainer.

        Args:
            args: the trainer's own.
            router_learning_rate: peak learning rate of the routers; None: the common one.
            router_weight_decay: weight decay of the routers; None: the common one.
            router_max_grad_norm: largest norm of the gradients of all routers together; None: not
                clipped on their own.
            compare_uniform: after each evaluation while training, compute up to 8 of its batches
                twice more, and warn once if learned routing is no better than all experts in equal
                shares.
            check_routers: for debugging, stop at the first router whose output is NaN or infinite,
                and name it; waits for the device after each router.
            kwargs: the trainer's own; and `on_nonfinite`, what to do at NaN or infinity in loss or
                gradients: `stop` the run (the default) or `skip` the optimizer step; and
                `allow_partial_resume`, whether to resume although state of the optimizer, the
                schedule, the random generators or the GradScaler is missing, or data and batches
                changed.
        """
        self._session: Session | None = None
        self._forgotten = False
        self._compare_uniform = compare_uniform
        self._check_routers = check_routers
        self._router_options = {
            "learning_rate": router_learning_rate,
            "weight_decay": router_weight_decay,
            "max_grad_norm": router_max_grad_norm,
        }
        for value in (*args, *kwargs.values()):
            if isinstance(value, TrainingArguments):
                fit_ddp(value)
                refuse_token(value)
        super().__init__(*args, **kwargs)
        require_adapter(self.model)
        self.add_callback(_Events(self))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """See `transformers.Trainer.train`."""
        RouterOptions(**self._router_options)
        check_setup(self.model, self.args.n_gpu)
        restore_routers(self.model)
        self._session = None
        checked = checked_routers(self.model) if self._check_routers else nullcontext()
        try:
            with checked:
                return super().train(*args, **kwargs)
        finally:
            if self._session is not None:
                self._session.end()
                self._session = None

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """See `transformers.Trainer.create_optimizer`; routers in groups of their own if asked."""
        optimizer = super().create_optimizer(*args, **kwargs)
        options = RouterOptions(**self._router_options)
        split_router_params(
            optimizer,
            self.model,
            learning_rate=options.learning_rate,
            weight_decay=options.weight_decay,
        )
        return optimizer

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """See `transformers.Trainer.training_step`."""
        if self._session is None:
            # Rate and decay already have groups of their own.
            options = RouterOptions(max_grad_norm=self._router_options["max_grad_norm"])
            optimizer: Any = self.optimizer
            self._session = Session(
                model,
                self.args.device,
                optimizer,
                options,
                compare_uniform=self._compare_uniform,
                keeps_counts=self.accelerator.scaler is not None or self._guard.policy == "skip",
            )
            self._go_on(self._session)
        self._session.start_step(self.state.global_step)
        steps = getattr(
            self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps
        )
        self._session.set_scale(self.accelerator.scaler, steps)
        return super().training_step(model, inputs, num_items_in_batch)

    def after_optimizer_step(self) -> None:
        """Follow an optimizer step of the trainer."""
        if self._session is None:
            return
        forgotten, self._forgotten = self._forgotten, False
        if self._session.was_skipped(self.optimizer, self.accelerator.scaler):
            self._session.after_skipped_step()
        elif not forgotten:
            self._session.after_step()

    def forget_step(self) -> None:
        """See `SafeRunMixin.forget_step`."""
        self._forgotten = True
        if self._session is not None:
            self._session.forget_step()

    def _go_on(self, session: Session) -> None:
        """Take over the counts of the run that is resumed."""
        if self._resumed is None:
            return
        counts = self._resumed / COUNTS
        found = load_file(counts) if counts.is_file() and self.args.process_index == 0 else {}
        session.go_on(int(read_marker(self._resumed).get("skipped_steps", 0)), found)

    def checkpoint_facts(self) -> dict[str, Any]:
        """See `CheckpointMixin.checkpoint_facts`."""
        skipped = 0 if self._session is None else self._session.skipped_steps
        return {**super().checkpoint_facts(), "skipped_steps": skipped}

    def write_extra_state(self, folder: Path) -> None:
        """See `CheckpointMixin.write_extra_state`."""
        counts = {} if self._session is None else self._session.counts()
        if counts and self.args.should_save:
            save_file({name: own.cpu() for name, own in counts.items()}, folder / COUNTS)

    def after_evaluation(self, batches: Any) -> None:
        """Follow an evaluation of the trainer."""
        if self._session is not None:
            self._session.after_evaluation(batches)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """See `trl.trainer.base_trainer`; a card that is there stays."""
        with kept_card(self.args, getattr(self, "hub_model_id", None)):
            super().create_model_card(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """See `transformers.Trainer.log`; all processes call it, as the trainer does."""
        if self._session is not None and "loss" in logs:
            logs.update(self._session.metrics())
        super().log(logs, *args, **kwargs)


class _Events(TrainerCallback):
    """Tells a trainer of the events it has no method for."""

    def __init__(self, trainer: MoETrainerMixin) -> None:
        self._trainer = trainer

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """See `TrainerCallback.on_optimizer_step`."""
        self._trainer.after_optimizer_step()

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `TrainerCallback.on_push_begin`."""
        before_push(args, state, keeps_card=True)

    def on_evaluate(self, *args: Any, eval_dataloader: Any = None, **kwargs: Any) -> None:
        """See `TrainerCallback.on_evaluate`."""
        self._trainer.after_evaluation(eval_dataloader or ())
