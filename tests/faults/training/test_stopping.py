"""Cases 50, 92, 93 and 97: the output folder, signals, and two runs in one folder."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import typer.main

from moeadapt.cli.train import train
from moeadapt.errors import ConfigError, TrainingError, TrainingStopped
from moeadapt.training import find_checkpoint
from moeadapt.training.output_folder import alone_in
from moeadapt.training.safe_run import SafeRunMixin
from moeadapt.training.stop_signals import StopSignals
from tests.faults.training.kit import DRIFTING, At, adapter, assert_same, hidden, moe, names, run
from tests.tiny import saved_base
from tests.toy import toy_text, toy_tokenizer


def a_file(folder: Path) -> Path:
    (folder / "file").write_text("mine")
    return folder / "file"


PLACES: dict[str, Callable[[Path], Path]] = {
    "is a file": a_file,
    "lies in a file": lambda folder: a_file(folder) / "run",
    "name too long": lambda folder: folder / ("x" * 300),
    "path too long": lambda folder: Path(str(folder) + "/x" * 3000),
}


@pytest.mark.parametrize("place", list(PLACES))
def test_fault_050_an_output_folder_that_cannot_be_made_is_refused(
    place: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"output_dir=.* cannot be used"):
        run(PLACES[place](tmp_path))


@pytest.fixture
def nobody() -> Any:
    """Lay down root's rights, which no mode of a folder stops."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


def test_fault_050_a_read_only_folder_is_refused(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o555)
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    request.getfixturevalue("nobody")
    with pytest.raises(ConfigError, match="Permission denied"):
        run(tmp_path / "run")


def test_fault_050_missing_parents_are_made(tmp_path: Path) -> None:
    run(tmp_path / "a" / "b", saves=False, max_steps=1).train()
    assert (tmp_path / "a" / "b").is_dir()


def send(number: int) -> Callable[..., None]:
    return lambda **kwargs: os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("saves", [True, False])
def test_fault_092_093_a_signal_saves_a_checkpoint_and_stops_and_resuming_is_bitwise(
    number: int, code: int, saves: bool, tmp_path: Path
) -> None:
    before = signal.getsignal(number)
    config = moe(**DRIFTING)
    whole = run(tmp_path / "whole", config=config, saves=False)
    whole.train()
    strike = At("on_step_begin", 2, send(number))
    stopped = run(tmp_path / "run", config=config, saves=saves, callbacks=[strike])
    with pytest.raises(TrainingStopped, match=r"after optimizer step 2.*checkpoint-2") as caught:
        stopped.train()
    assert caught.value.exit_code == caught.value.code == code
    assert isinstance(caught.value, SystemExit)
    assert signal.getsignal(number) is before
    assert find_checkpoint(tmp_path / "run").endswith("checkpoint-2")
    resumed = run(tmp_path / "run", config=config)
    resumed.train(resume_from_checkpoint=True)
    assert_same(adapter(resumed), adapter(whole))


def test_fault_093_a_second_sigint_stops_now(tmp_path: Path) -> None:
    first = At("on_step_begin", 2, send(signal.SIGINT))
    second = At("on_pre_optimizer_step", 2, send(signal.SIGINT))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, callbacks=[first, second]).train()
    assert signal.getsignal(signal.SIGINT) is before
    assert [n for n in names(tmp_path) if n.startswith("checkpoint")] == ["checkpoint-1"]
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("saves", ["no", "epoch", "steps"])
def test_fault_092_a_signal_after_the_last_step_loses_no_weights(
    saves: str, tmp_path: Path
) -> None:
    fields = {"eval_dataset": toy_text(2)}
    args = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 3, "save_strategy": saves}
    strike = At("on_evaluate", 4, send(signal.SIGTERM))
    stopped = run(tmp_path, fields=fields, callbacks=[strike], **args)
    with pytest.raises(TrainingStopped, match=r"after optimizer step 3.*checkpoint-3") as caught:
        stopped.train()
    assert caught.value.exit_code == 143
    resumed = run(tmp_path, fields=fields, **args)
    resumed.train(resume_from_checkpoint=True)
    assert_same(adapter(resumed), adapter(stopped))


def test_fault_092_a_signal_after_the_last_epoch_leaves_the_saving_to_the_caller(
    tmp_path: Path,
) -> None:
    fields = {"eval_dataset": toy_text(2)}
    strike = At("on_evaluate", 4, send(signal.SIGTERM))
    args = {"max_steps": 3, "eval_strategy": "epoch", "saves": False}
    trainer = run(tmp_path, fields=fields, callbacks=[strike], **args)
    with pytest.warns(UserWarning, match="the run is complete, and train returns"):
        assert trainer.train().global_step == 3
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_fault_092_the_checkpoint_of_a_stopped_run_stays_beside_the_best(tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    # The loss falls, so the first is the best.
    args = {**best, "greater_is_better": True, "eval_strategy": "steps", "eval_steps": 1}
    strike = At("on_step_begin", 3, send(signal.SIGTERM))
    fields = {"eval_dataset": toy_text(2)}
    trainer = run(tmp_path, fields=fields, callbacks=[strike], save_total_limit=1, **args)
    with pytest.raises(TrainingStopped, match="checkpoint-3"):
        trainer.train()
    assert {"checkpoint-1", "checkpoint-3"} <= set(names(tmp_path))


def test_fault_093_ctrl_c_twice_after_a_sigterm_stops_now() -> None:
    signals = StopSignals()
    with signals.listen():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.exit_code == 143
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def recipe(folder: Path, *flags: str) -> list[str]:
    """Return the command line of a tiny run, data and model included."""
    base = saved_base("llama", folder)
    toy_tokenizer().save_pretrained(base)
    toy_text(6).to_json(str(folder / "rows.jsonl"))
    fields = {
        "model_name_or_path": base,
        "dataset_name": folder / "rows.jsonl",
        "output_dir": folder / "run",
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "max_length": 32,
        "save_steps": 1,
        "use_cpu": "true",
        "bf16": "false",
        "report_to": "none",
        "moe.target_modules": "[gate_proj, up_proj, down_proj]",
        "moe.num_experts": 4,
    }
    words = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    return [*words, *flags]


def command_line(arguments: list[str]) -> int:
    """Do what `moeadapt train sft` does with the arguments; return its exit code."""
    try:
        train("sft", arguments, None, dry_run=False, as_json=False)
    except typer.Exit as end:
        return end.exit_code
    return 0


def test_fault_092_the_command_line_stops_resumes_and_answers_with_exit_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = SafeRunMixin.before_optimizer_step

    def strike(self: Any) -> None:
        if self.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self)

    with monkeypatch.context() as patched:
        patched.setattr(SafeRunMixin, "before_optimizer_step", strike)
        assert command_line(recipe(tmp_path)) == 143
    assert "checkpoint-2. Go on with" in capsys.readouterr().err
    (tmp_path / "run" / "checkpoint-2" / "optimizer.pt").unlink()
    last = ("--resume_from_checkpoint", "last")
    assert command_line(recipe(tmp_path, *last)) == 1
    assert "has no optimizer.pt" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="fresh state"):
        assert command_line(recipe(tmp_path, *last, "--allow-partial-resume")) == 0
    assert (tmp_path / "run" / "checkpoint-3").is_dir()
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_fault_050_the_command_line_refuses_before_it_loads_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--output_dir", str(a_file(tmp_path)), "--model_name_or_path", "none/such")
    assert command_line(recipe(tmp_path, *flags)) == 2
    assert "cannot be used" in capsys.readouterr().err


def hold(folder: str, ready: Any, done: Any) -> None:
    with alone_in(folder):
        ready.set()
        done.wait(60)


def test_fault_097_a_second_run_in_one_folder_is_refused(tmp_path: Path) -> None:
    processes = multiprocessing.get_context("fork")
    ready, done = processes.Event(), processes.Event()
    other = processes.Process(target=hold, args=(str(tmp_path), ready, done))
    other.start()
    trainer = run(tmp_path, max_steps=2)
    try:
        assert ready.wait(60)
        with pytest.raises(TrainingError, match="another run trains into"):
            trainer.train()
        assert trainer.state.global_step == 0
        assert find_nothing(tmp_path)
    finally:
        done.set()
        other.join()
    # Free again, also after a process that was killed.
    trainer.train()
    assert torch.isfinite(torch.tensor(trainer.state.log_history[-1]["train_loss"]))


def find_nothing(folder: Path) -> bool:
    return not any(name.startswith("checkpoint") for name in names(folder))
