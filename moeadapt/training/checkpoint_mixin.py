"""`CheckpointMixin`: a trainer's checkpoints and saved models are whole, or are not there."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list, reduce
from safetensors import SafetensorError
from torch import nn

from moeadapt.errors import ExportError, TrainingError
from moeadapt.hidden_folder import HiddenFolder, remove_hidden
from moeadapt.training.checkpoint_files import STATE, write_marker
from moeadapt.training.memory import is_out_of_memory
from moeadapt.training.nonfinite import refuse_nonfinite_weights
from moeadapt.training.resume import last_complete, list_checkpoints
from moeadapt.whole_folder import give_modes, put_folder, sync_all, whole_folder

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object  # the real base class comes second: class X(MoETrainerMixin, SFTTrainer)

_PREFIX = "checkpoint"

_FAILURES = (OSError, ExportError, SafetensorError, RuntimeError, MemoryError)
"""What disks and allocators make the writers raise."""


class CheckpointMixin(_Trainer):
    """Writes into a hidden folder, and renames it when everything is on the disk.

    A killed run leaves at most hidden folders, which the next save removes. Older checkpoints are
    deleted after the new one is complete. If the folder cannot be written any more, the checkpoint
    goes to a new one below the system's folder for temporary files (`TMPDIR`), and the run stops.
    """

    model: Any
    _hidden: Path | None = None
    _rescuing = False
    _push_later = False

    def checkpoint_facts(self) -> dict[str, Any]:
        """Return what the marker says beside the names of files; plain data."""
        return {}

    def write_extra_state(self, folder: Path) -> None:
        """Write what the trainer does not know of into a checkpoint; all processes call it."""

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._hidden) if self._hidden is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(super()._get_output_dir(trial))
        final = run_dir / f"{_PREFIX}-{self.state.global_step}"
        refuse_nonfinite_weights(self.model, str(final))
        error = self._attempt(model, trial, final)
        if error is None:
            self._rotate(run_dir, final)
            return
        kept = None if is_out_of_memory(error) else self._rescue(model, trial)
        rescued = (
            f"The complete checkpoint was written to {kept}: move it to a safe place, and go on "
            "with resume_from_checkpoint set to it"
            if kept is not None
            else _say_last(run_dir)
        )
        raise TrainingError(
            f"cannot save {final}: {error}. Nothing of it was left there, and the run stops. "
            f"{rescued}"
        ) from error

    def _attempt(self, model: nn.Module, trial: Any, final: Path) -> Exception | None:
        """Write one checkpoint; return what prevented it, in any process."""
        error: Exception | None = None
        best = self.state.best_model_checkpoint
        with self._staging(final) as (hidden, failed):
            error = failed
            if error is None:
                try:
                    self._write(model, trial, hidden, final)
                except _FAILURES as caught:
                    error = caught
            error = self._agree(error)
            if error is None:
                try:
                    self._finish(hidden / final.name, final)
                except _FAILURES as caught:
                    error = caught
                error = self._agree(error)
        if error is not None:
            self.state.best_model_checkpoint = best
        elif self._push_later and not self._rescuing:
            super()._push_from_checkpoint(str(final))
        self._push_later = False
        return error

    def _write(self, model: nn.Module, trial: Any, hidden: Path, final: Path) -> None:
        super()._save_checkpoint(model, trial)
        folder = hidden / final.name
        self.write_extra_state(folder)
        best = self.state.best_model_checkpoint
        if best is not None and Path(best).parent == hidden:
            self.state.best_model_checkpoint = str(final.parent / Path(best).name)
            if self.args.should_save:
                self.state.save_to_json(str(folder / STATE))

    def _finish(self, folder: Path, final: Path) -> None:
        if not self.args.should_save:
            return
        give_modes(folder)
        write_marker(folder, self.checkpoint_facts())
        sync_all(folder)
        put_folder(folder, final)

    @contextmanager
    def _staging(self, final: Path) -> Iterator[tuple[Path, Exception | None]]:
        """Make a hidden folder, the same for all processes, and write there from now on."""
        folder, error = HiddenFolder(final), None
        if self.args.should_save:
            remove_hidden(final.parent, f"{_PREFIX}-*")
            try:
                folder.make()
            except _FAILURES as caught:
                error = caught
        path = [str(folder.path)]
        if self.args.world_size > 1:
            broadcast_object_list(path)
            if self.args.should_save and error is None:
                os.makedirs(path[0], exist_ok=True)  # on the other nodes
        self._hidden = Path(path[0])
        try:
            yield self._hidden, self._agree(error)
        finally:
            self._hidden = None
            folder.leave()
            if self.args.should_save:
                shutil.rmtree(path[0], ignore_errors=True)

    def _agree(self, error: Exception | None) -> Exception | None:
        """Return this process's error, or that another one had one."""
        if self.args.world_size > 1:
            mine = torch.tensor(float(error is not None), device=self.args.device)
            if float(reduce(mine, reduction="sum")) > 0 and error is None:  # type: ignore[arg-type]
                return RuntimeError("another process could not write its part")
        return error

    def _rescue(self, model: nn.Module, trial: Any) -> str | None:
        """Write the checkpoint elsewhere; None if that does not work either."""
        name = Path(self.args.output_dir or "run").name
        place: list[Any] = [None]
        if self.args.should_save:
            # Without room for a folder there is none for a checkpoint.
            with suppress(OSError):
                place = [tempfile.mkdtemp(prefix=f"moeadapt-{name}-")]
        if self.args.world_size > 1:
            broadcast_object_list(place)
        if place[0] is None:
            return None
        final = Path(place[0]) / f"{_PREFIX}-{self.state.global_step}"
        self._rescuing = True
        try:
            if self._attempt(model, trial, final) is None:
                return str(final)
        finally:
            self._rescuing = False
        shutil.rmtree(place[0], ignore_errors=True)
        return None

    def _rotate(self, run_dir: Path, final: Path) -> None:
        """Delete the checkpoints of the first steps beyond the limit: not `final`, nor the best.

        The time of a file says nothing of its age when the clock was set back.
        """
        limit = self.args.save_total_limit
        if not self.args.should_save or limit is None or limit <= 0:
            return
        folders = list_checkpoints(run_dir)[::-1]
        best = self.state.best_model_checkpoint
        kept = {final, *([] if best is None else [Path(best)])}
        surplus = len(folders) - max(limit, len(kept))
        for folder in [one for one in folders if one not in kept][: max(surplus, 0)]:
            # Half of a checkpoint must never be found under its name.
            gone = HiddenFolder(folder)
            try:
                os.rename(folder, gone.path)
            except OSError as error:
                raise TrainingError(
                    f"cannot delete the old checkpoint {folder}: {error}. The newest one is "
                    f"complete: {final}. Check the rights, or raise save_total_limit"
                ) from error
            shutil.rmtree(gone.path, ignore_errors=True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """See `transformers.Trainer.save_model`; the folder has the old state or the new one."""
        target = output_dir if output_dir is not None else self.args.output_dir
        if self._hidden is not None or self.args.world_size > 1 or not target:
            super().save_model(output_dir, _internal_call=_internal_call)
            return
        refuse_nonfinite_weights(self.model, str(target))
        try:
            with whole_folder(target) as folder:
                super().save_model(str(folder), _internal_call=True)
        except _FAILURES as error:
            raise TrainingError(
                f"cannot save {target}: {error}. What was there is as it was; free space or check "
                "the rights, or give save_model another folder"
            ) from error
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """See `transformers.Trainer.create_model_card`; not while its folder cannot be written."""
        if not self._rescuing:
            super().create_model_card(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._hidden is None:
            super()._push_from_checkpoint(checkpoint_folder)
        else:
            self._push_later = True


def _say_last(run_dir: Path) -> str:
    """Say which checkpoint a run can go on from; its folder may be closed to us by now."""
    try:
        last = last_complete(run_dir)
    except OSError as error:
        return f"Which checkpoint is the last complete one cannot be seen: {error}"
    return f"The last complete checkpoint is {last or 'none: it was the first'}"
