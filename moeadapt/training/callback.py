"""`MoeAdaptCallback`: one line for stock trainers; needs transformers, not TRL."""

import inspect
import math
import warnings
from typing import Any

from accelerate.state import PartialState
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import has_length

from moeadapt.training.checkpoint_files import (
    MARKER,
    checkpoint_folder,
    read_marker,
    write_marker,
)
from moeadapt.training.ddp import check_ddp
from moeadapt.training.hub_push import before_push
from moeadapt.training.nonfinite import NonfiniteGuard
from moeadapt.training.param_groups import RouterOptions
from moeadapt.training.session import Session, check_setup, restore_routers
from moeadapt.tuner.context import find_context
from moeadapt.whole_folder import give_modes


class MoeAdaptCallback(TrainerCallback):
    """Gives the routers what they need from a trainer that knows nothing about them.

    1. Before DDP and the optimizer are made: routers are float32 again.
    2. Before each optimizer step: the schedule's values, and the scale of the auxiliary losses,
       exact also for the last, shorter accumulation of an epoch. Only where the data has no length
       is that accumulation weighted like the others, and it is said once.
    3. In each optimizer step, after the trainer's own clipping: see `router_step`.
    4. After each optimizer step: selection biases, adaptive coefficients and the set of experts.
    5. At each log of the loss: `moe/` metrics beside it (see `router_metrics`). Reporters read the
       logs in the order of the callbacks, so this one moves itself to the front. Routers that go
       wrong cause a `RoutingWarning`, each symptom once (see `RouterHealth`).
    6. After each evaluation, with `compare_uniform`: see `compare_with_uniform`.
    7. Before each optimizer step: gradients that are NaN or infinite stop the run or skip the step
       (see `NonfiniteGuard`); a step that a GradScaler skips counts for nothing.
    8. After each save: the marker of a complete checkpoint, which `find_checkpoint` reads.

    Raises:
        ConfigError: an option is out of range, see `RouterOptions`; at the start of training, the
            model has no mixture of LoRA experts.
        TrainingError: at the start of training, see `check_setup`, `restore_routers` and `Session`;
            after an evaluation, see `compare_with_uniform`.

    Example:
        >>> trl.SFTTrainer(model, peft_config=MoeLoraConfig(), callbacks=[MoeAdaptCallback()])
    """

    def __init__(
        self,
        *,
        router_learning_rate: float | None = None,
        router_weight_decay: float | None = None,
        router_max_grad_norm: float | None = None,
        compare_uniform: bool = False,
        on_nonfinite: str = "stop",
    ) -> None:
        """Set what is different for routers.

        Args:
            router_learning_rate: peak learning rate of the routers; the trainer's scheduler scales
                it as it scales the common one. None: the common one.
            router_weight_decay: weight decay of the routers; None: the common one.
            router_max_grad_norm: largest norm of the gradients of all routers together; None: not
                clipped on their own.
            compare_uniform: after each evaluation, compute up to 8 of its batches twice more, and
                warn once if learned routing is no better than all experts in equal shares.
            on_nonfinite: what to do at NaN or infinity in the gradients: `stop` or `skip`.
        """
        self._guard = NonfiniteGuard(on_nonfinite)
        self._forgotten = False
        self._compare_uniform = compare_uniform
        self._options = RouterOptions(
            learning_rate=router_learning_rate,
            weight_decay=router_weight_decay,
            max_grad_norm=router_max_grad_norm,
        )
        self._session: Session | None = None
        self._resuming = True
        self._epoch_length: int | None = None
        self._updates_left = 0

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Repair the routers while nothing has been built on their dtype."""
        if model is not None and find_context(model) is not None:
            restore_routers(model)
            check_ddp(args)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Check, and start counting."""
        assert model is not None
        check_setup(model, args.n_gpu)
        self._session = Session(
            model,
            args.device,
            optimizer,
            self._options,
            compare_uniform=self._compare_uniform,
            keeps_counts=args.fp16 or self._guard.policy == "skip",
        )
        if state.global_step > 0:
            # No event says which checkpoint it was, but it is named after its step.
            marker = read_marker(checkpoint_folder(args, state))
            self._session.go_on(int(marker.get("skipped_steps", 0)), {})
        restore_routers(model, wrapped=True)
        self._resuming = True
        _move_to_front(self)
        if args.gradient_accumulation_steps > 1 and not has_length(train_dataloader):
            warnings.warn(
                "the training data has no length, so MoeAdaptCallback cannot tell the last, "
                "shorter accumulation of an epoch from the others; its auxiliary losses weigh "
                "less. A trainer of moeadapt.training is exact here too",
                stacklevel=2,
            )

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Count down the optimizer steps of the epoch, from its middle when resuming there."""
        resuming, self._resuming = self._resuming, False
        if not has_length(train_dataloader):
            self._epoch_length = None
            return
        self._epoch_length = len(train_dataloader)
        updates = max(math.ceil(self._epoch_length / args.gradient_accumulation_steps), 1)
        skipped = resuming and not args.ignore_data_skip
        self._updates_left = updates - (state.global_step % updates if skipped else 0)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Set schedule and scale for the micro-batches of this optimizer step."""
        assert self._session is not None
        self._session.start_step(state.global_step)
        steps = args.gradient_accumulation_steps
        if self._epoch_length is not None:
            self._updates_left -= 1
            if self._updates_left == 0:
                steps = self._epoch_length % steps or steps
        self._session.set_scale(getattr(optimizer, "scaler", None), steps)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Look at the gradients."""
        assert model is not None
        assert self._session is not None
        scaler = getattr(optimizer, "scaler", None)
        scaled = scaler is not None and scaler.is_enabled()
        found = self._guard.find(model, scaled=scaled, world_size=args.world_size)
        if found:
            self._forgotten = True
            self._session.forget_step()
            self._guard.act(found, model, state.global_step + 1, scaled=scaled)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Let routers and losses follow the optimizer step."""
        assert self._session is not None
        forgotten, self._forgotten = self._forgotten, False
        if self._session.was_skipped(optimizer, getattr(optimizer, "scaler", None)):
            self._session.after_skipped_step()
        elif not forgotten:
            self._session.after_step()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Mark the checkpoint as complete."""
        folder = checkpoint_folder(args, state)
        PartialState().wait_for_everyone()
        # A trainer of ours has marked it.
        if args.should_save and folder.is_dir() and not (folder / MARKER).exists():
            skipped = 0 if self._session is None else self._session.skipped_steps
            give_modes(folder)
            write_marker(folder, {"step": state.global_step, "skipped_steps": skipped})

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep manifest and weights together, and say what the trainer will do to a card."""
        before_push(args, state, keeps_card=False)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the metrics to a log of the training loss."""
        if self._session is None or logs is None or "loss" not in logs:
            return
        metrics = self._session.metrics()
        logs.update(metrics)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(metrics)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Compare learned routing with equal shares, if asked to."""
        # Fresh experts do nothing before the first step, whatever chooses them.
        if self._session is not None and state.global_step:
            self._session.after_evaluation(eval_dataloader or ())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Withdraw the scale."""
        if self._session is not None:
            self._session.end()
            self._session = None


def _move_to_front(callback: TrainerCallback) -> None:
    """Make the handler that is calling `callback` call it first from now on.

    No event is given the trainer or the handler, so it is found among the callers.
    """
    frame = inspect.currentframe()
    while frame is not None:
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler) and callback in handler.callbacks:
            # The running loop over this list goes on behind the callback's old place.
            handler.callbacks.remove(callback)
            handler.callbacks.insert(0, callback)
            return
        frame = frame.f_back
    warnings.warn(
        "MoeAdaptCallback was not called by a CallbackHandler of transformers, so its metrics only "
        "reach the log history and the callbacks behind it",
        stacklevel=2,
    )
