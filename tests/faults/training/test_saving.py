"""Cases 82, 90, 91, 96, 98 and 99: what is on the disk after a save that failed, or did not."""

import json
import multiprocessing
import os
import resource
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moeadapt.errors import TrainingError
from moeadapt.training import find_checkpoint
from moeadapt.training.checkpoint_files import inspect_checkpoint
from tests.faults.training.kit import At, adapter, assert_same, hidden, names, run
from tests.tiny import adapted


def checkpoints(folder: Path) -> list[str]:
    return [name for name in names(folder) if name.startswith("checkpoint")]


def test_fault_082_lacking_memory_while_saving_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    trainer = run(tmp_path)
    original = trainer._save_optimizer_and_scheduler

    def save(folder: str) -> None:
        if trainer.state.global_step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        original(folder)

    trainer._save_optimizer_and_scheduler = save
    with pytest.raises(TrainingError, match=r"cannot save .*-3: CUDA.*last.* is .*checkpoint-2"):
        trainer.train()
    assert find_checkpoint(tmp_path).endswith("checkpoint-2")
    assert checkpoints(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    assert hidden(tmp_path) == []


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """Let no file grow beyond `limit` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit", [4_000, 20_000, 60_000])
def test_fault_090_a_full_disk_leaves_the_last_checkpoint_and_nothing_else(
    limit: int, tmp_path: Path
) -> None:
    trainer = run(tmp_path)
    original = trainer._save_checkpoint

    def save(model: Any, trial: Any) -> None:
        if trainer.state.global_step < 3:
            return original(model, trial)
        with small_files(limit):
            return original(model, trial)

    trainer._save_checkpoint = save
    with pytest.raises(TrainingError, match=r"cannot save .*-3.*last complete.*checkpoint-2"):
        trainer.train()
    assert find_checkpoint(tmp_path).endswith("checkpoint-2")
    assert checkpoints(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("limit", [1_000, 20_000])
def test_fault_090_a_full_disk_leaves_a_saved_adapter_as_it_was(limit: int, tmp_path: Path) -> None:
    old, new = adapted("llama", "block", seed=1), adapted("llama", "block", seed=2)
    old.save_pretrained(tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    with small_files(limit), pytest.raises(Exception, match=r"(?i)large|write|space"):
        new.save_pretrained(tmp_path / "adapter")
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before
    assert names(tmp_path) == ["adapter"]


def test_fault_091_a_folder_that_turns_read_only_keeps_the_weights_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rescue, folder = tmp_path / "rescue", tmp_path / "run"
    rescue.mkdir()
    rescue.chmod(0o777)
    below_temporary = Path(tempfile.gettempdir()).resolve()
    for parent in (tmp_path, *tmp_path.parents):
        if below_temporary in parent.resolve().parents:
            parent.chmod(0o755)  # pytest makes its own unreadable for others
    monkeypatch.setattr("tempfile.tempdir", str(rescue))
    trainer = run(folder)
    uid = os.geteuid()
    original = trainer._save_checkpoint

    def save(model: Any, trial: Any) -> None:
        if trainer.state.global_step < 3:
            return original(model, trial)
        folder.chmod(0o555)
        if uid == 0:
            os.seteuid(65534)  # root may write anywhere
        try:
            return original(model, trial)
        finally:
            if uid == 0:
                os.seteuid(0)

    trainer._save_checkpoint = save
    with pytest.raises(TrainingError, match=r"Permission denied.*was written to .*checkpoint-3"):
        trainer.train()
    folder.chmod(0o755)
    (kept,) = rescue.glob("moeadapt-run-*/checkpoint-3")
    assert checkpoints(folder) == ["checkpoint-1", "checkpoint-2"]
    whole = run(tmp_path / "whole")
    whole.train()
    resumed = run(folder)
    resumed.train(resume_from_checkpoint=str(kept))
    assert_same(adapter(resumed), adapter(whole))


def test_fault_096_the_old_checkpoint_goes_after_the_new_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[list[str]] = []
    original = shutil.rmtree

    def rmtree(path: Any, *args: Any, **kwargs: Any) -> None:
        here = checkpoints(tmp_path)
        whole = [name for name in here if inspect_checkpoint(tmp_path / name, ()).complete]
        if Path(path).parent == tmp_path:
            assert whole == checkpoints(tmp_path)
            found.append(whole)
        original(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    run(tmp_path, save_total_limit=1).train()
    assert ["checkpoint-2"] in found
    assert checkpoints(tmp_path) == ["checkpoint-5"]
    assert all(found)


def test_fault_096_the_new_checkpoint_stays_when_the_clock_was_set_back(tmp_path: Path) -> None:
    def set_back(**kwargs: Any) -> None:
        os.utime(tmp_path / "checkpoint-1", (4e9, 4e9))

    callbacks = [At("on_save", 1, set_back)]
    run(tmp_path, save_total_limit=1, max_steps=2, callbacks=callbacks).train()
    assert checkpoints(tmp_path) == ["checkpoint-2"]


def test_fault_096_a_save_that_fails_deletes_nothing(tmp_path: Path) -> None:
    trainer = run(tmp_path, save_total_limit=1)

    def fail(folder: str) -> None:
        raise OSError(28, "No space left on device")

    trainer.add_callback(
        At("on_step_end", 3, lambda **_: setattr(trainer, "_save_rng_state", fail))
    )
    with pytest.raises(TrainingError, match="No space left"):
        trainer.train()
    assert checkpoints(tmp_path) == ["checkpoint-2"]
    assert find_checkpoint(tmp_path).endswith("checkpoint-2")


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_fault_098_files_get_the_mode_that_the_umask_says(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        adapted("llama", "block").save_pretrained(tmp_path / "adapter")
        trainer = run(tmp_path / "run", max_steps=1)
        trainer.train()
        trainer.save_model()
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in files)
    for path in files:
        if path.name != ".moeadapt.lock":
            assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path


def test_fault_099_saving_an_adapter_keeps_what_else_is_in_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    old, new = adapted("llama", "block", seed=1), adapted("llama", "block", lora_alpha=16, seed=2)
    old.save_pretrained(folder)
    (folder / "notes.txt").write_text("mine")
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card + "\nMy own words.\n")
    new.save_pretrained(folder)
    assert json.loads((folder / "adapter_config.json").read_text())["lora_alpha"] == 16
    (folder / "checkpoint-1").mkdir()
    old.save_pretrained(folder)
    assert json.loads((folder / "adapter_config.json").read_text())["lora_alpha"] == 8
    assert (folder / "notes.txt").read_text() == "mine"
    assert "My own words." in (folder / "README.md").read_text()
    assert names(tmp_path) == ["adapter"]
    assert hidden(tmp_path) == []


def labelled(alpha: int) -> Any:
    """Return a model whose weights say which settings belong to them."""
    model = adapted("llama", "block", lora_alpha=alpha)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.fill_(alpha)
    return model


def save_for_ever(folder: str, stop: Any) -> None:
    models = [labelled(8), labelled(16)]
    while not stop.is_set():
        for model in models:
            model.save_pretrained(folder)


def test_fault_099_a_reader_finds_the_old_adapter_or_the_new_one(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    processes = multiprocessing.get_context("fork")
    stop = processes.Event()
    labelled(8).save_pretrained(folder)
    writer = processes.Process(target=save_for_ever, args=(str(folder), stop))
    writer.start()
    seen: list[int] = []
    try:
        while len(seen) < 300 or len(set(seen)) < 2:
            opened = os.open(folder, os.O_RDONLY)
            try:
                here = Path(f"/proc/self/fd/{opened}")
                alpha = json.loads((here / "adapter_config.json").read_text())["lora_alpha"]
                weights = load_file(here / "adapter_model.safetensors")
            except (FileNotFoundError, RuntimeError):
                continue  # this state was replaced, and removed, while it was read
            finally:
                os.close(opened)
            first = next(t for n, t in weights.items() if "lora_A" in n)
            seen.append(int(alpha))
            assert bool((first == alpha).all())
    finally:
        stop.set()
        writer.join()
    assert names(tmp_path) == ["adapter"]


def test_fault_091_a_rescued_checkpoint_is_not_pushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[str] = []
    monkeypatch.setattr(
        "transformers.Trainer._push_from_checkpoint", lambda self, folder: pushed.append(folder)
    )
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    trainer = run(tmp_path / "run")
    original, places = trainer._finish, []

    def finish(folder: Path, final: Path) -> None:
        places.append(final)
        if len(places) == 1:
            raise OSError("the disk is gone")
        trainer._push_from_checkpoint(str(final))
        original(folder, final)

    trainer._finish = finish
    trainer._push_later = True
    with pytest.raises(TrainingError, match="was written to .*checkpoint-1"):
        trainer.train()
    assert len(places) == 2
    assert pushed == []
