"""Cases 84 to 88, 94 and 95: going on from a checkpoint."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from moeadapt import MoeAdaptCallback
from moeadapt.errors import ConfigError, TrainingError
from moeadapt.training import find_checkpoint
from moeadapt.training.checkpoint_files import MARKER
from moeadapt.training.run_facts import changed_facts, changed_length, run_facts
from tests.faults.training.kit import DRIFTING, adapter, assert_same, copy_run, moe, run
from tests.toy import toy_text
from tests.training.kit import arguments


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """An uninterrupted run of five steps in two epochs, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = run(folder, config=moe(**DRIFTING))
    trainer.train()
    return folder, trainer


def again(folder: Path, **overrides: Any) -> Any:
    return run(folder, **{"config": moe(**DRIFTING), "saves": False, **overrides})


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_fault_084_resuming_at_any_step_gives_the_same_bits(
    step: int, whole: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, expected = whole
    resumed = again(tmp_path)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    assert resumed.state.global_step == 5
    assert_same(adapter(resumed), adapter(expected))

    def logs(trainer: Any) -> list[float]:
        return [log["moe/load_max"] for log in trainer.state.log_history if "loss" in log]

    # The window of the log at step 4 began before the checkpoint of step 3.
    assert logs(resumed) == logs(expected)


def test_fault_084_resuming_twice_gives_the_same_bits(
    whole: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, expected = whole
    first = again(tmp_path, saves=True, max_steps=5)
    first.args.max_steps = 5
    first.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    second = again(tmp_path)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(adapter(second), adapter(expected))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_fault_085_missing_state_is_refused_unless_allowed(
    name: str, whole: tuple[Path, Any], tmp_path: Path
) -> None:
    folder = copy_run(whole[0], tmp_path / "run")
    (folder / "checkpoint-5" / name).unlink()
    with pytest.raises(TrainingError, match=f"has no {name}.*allow_partial_resume"):
        again(folder).train(resume_from_checkpoint=True)
    partial = again(folder, fields={"allow_partial_resume": True}, max_steps=6)
    with (
        pytest.warns(UserWarning, match=f"has no {name}"),
        pytest.warns(UserWarning, match="goes on with max_steps=6"),
    ):
        partial.train(resume_from_checkpoint=True)
    assert partial.state.global_step == 6


def test_fault_085_missing_scaler_state_is_refused(whole: tuple[Path, Any], tmp_path: Path) -> None:
    trainer = again(tmp_path)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(TrainingError, match=r"has no scaler\.pt"):
        trainer.train(resume_from_checkpoint=str(whole[0] / "checkpoint-2"))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json"]
)
def test_fault_086_a_truncated_file_falls_back_and_says_so(
    name: str, marked: bool, whole: tuple[Path, Any], tmp_path: Path
) -> None:
    folder = copy_run(whole[0], tmp_path / "run")
    cut(folder / "checkpoint-5" / name)
    if not marked:
        (folder / "checkpoint-5" / MARKER).unlink()
    resumed = again(folder)
    with pytest.warns(UserWarning, match=rf"resuming from .*checkpoint-4, since .*-5 .*{name}"):
        resumed.train(resume_from_checkpoint=True)
    assert_same(adapter(resumed), adapter(whole[1]))
    with pytest.raises(TrainingError, match=rf"{name}.*checkpoint-4 is complete"):
        again(folder).train(resume_from_checkpoint=str(folder / "checkpoint-5"))


def test_fault_086_one_flipped_bit_falls_back(whole: tuple[Path, Any], tmp_path: Path) -> None:
    folder = copy_run(whole[0], tmp_path / "run")
    path = folder / "checkpoint-5" / "optimizer.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.warns(UserWarning, match=r"optimizer\.pt was changed after it was saved"):
        assert find_checkpoint(folder).endswith("checkpoint-4")


def test_fault_087_an_empty_or_half_written_checkpoint_falls_back(
    whole: tuple[Path, Any], tmp_path: Path
) -> None:
    folder = copy_run(whole[0], tmp_path / "run")
    (folder / "checkpoint-9").mkdir()
    # A stock trainer writes the state of the trainer last.
    (folder / "checkpoint-5" / "trainer_state.json").unlink()
    (folder / "checkpoint-5" / MARKER).unlink()
    resumed = again(folder)
    with pytest.warns(UserWarning, match=r"checkpoint-4, since .*-9 .*empty; .*-5 .*is missing"):
        resumed.train(resume_from_checkpoint=True)
    assert_same(adapter(resumed), adapter(whole[1]))


def test_fault_087_without_any_complete_checkpoint_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no checkpoint to resume from"):
        again(tmp_path).train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-9").mkdir()
    with pytest.raises(TrainingError, match=r"no checkpoint .* is complete.*checkpoint-9"):
        again(tmp_path).train(resume_from_checkpoint=True)


def test_fault_088_a_checkpoint_marked_incomplete_is_passed_over(
    whole: tuple[Path, Any], tmp_path: Path
) -> None:
    folder = copy_run(whole[0], tmp_path / "run")
    (folder / "checkpoint-5" / "checkpoint-is-incomplete.txt").write_text("in progress")
    with pytest.warns(UserWarning, match=r"checkpoint-4, since .*checkpoint-is-incomplete\.txt"):
        assert find_checkpoint(folder).endswith("checkpoint-4")


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "r": ({"config": moe(**{**DRIFTING, "r": 8})}, "r: 4 -> 8"),
    "experts": ({"config": moe(**{**DRIFTING, "num_experts": 8})}, "num_experts: 4 -> 8"),
    "router": ({"config": moe(**{**DRIFTING, "router": "top_k"})}, "router: .*noise.* -> "),
    "data": ({"rows": toy_text(6, seed=1)}, "data_sha256: "),
    "batch": ({"per_device_train_batch_size": 3}, "per_device_train_batch_size: 2 -> 3"),
    "rate": ({"learning_rate": 0.5}, "learning_rate: .* -> 0.5"),
    "routers": ({"fields": {"router_learning_rate": 0.1}}, "router_learning_rate: None -> 0.1"),
    "optimizer": ({"optim": "sgd"}, "optim: 'adamw_torch.*' -> 'sgd'"),
    "warm-up": ({"warmup_steps": 3}, "warmup_steps: 0.* -> 3"),
    "schedule": ({"lr_scheduler_kwargs": {"a": 1}}, "lr_scheduler_kwargs: None -> {'a': 1}"),
    "last batch": ({"dataloader_drop_last": True}, "dataloader_drop_last: False -> True"),
    "order": (
        {"train_sampling_strategy": "sequential"},
        "train_sampling_strategy: 'random' -> 'sequential'",
    ),
    "objective": ({"completion_only_loss": False}, "completion_only_loss: None -> False"),
    "stream": ({"rows": toy_text(6).to_iterable_dataset()}, "data_rows: 6 -> 'a stream'"),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_fault_094_other_settings_are_refused_with_a_diff(
    change: str, whole: tuple[Path, Any], tmp_path: Path
) -> None:
    overrides, line = CHANGES[change]
    checkpoint = str(whole[0] / "checkpoint-4")
    trainer = again(tmp_path, **overrides)
    before = adapter(trainer)
    with pytest.raises(TrainingError, match=rf"other settings \(then -> now\):\n  {line}"):
        trainer.train(resume_from_checkpoint=checkpoint)
    assert_same(adapter(trainer), before)


def test_fault_094_other_data_can_be_allowed(whole: tuple[Path, Any], tmp_path: Path) -> None:
    fields = {"allow_partial_resume": True}
    trainer = again(tmp_path, rows=toy_text(6, seed=1), fields=fields)
    with pytest.warns(UserWarning, match="data_sha256"):
        trainer.train(resume_from_checkpoint=str(whole[0] / "checkpoint-4"))


def facts(name: str, folder: Path, **overrides: Any) -> dict[str, Any]:
    """Return what a checkpoint would say of a run."""
    return json.loads(json.dumps(run_facts(arguments(name, folder, **overrides), toy_text(2))))


def test_fault_094_of_trl_only_what_the_loss_is_made_of_is_compared(tmp_path: Path) -> None:
    then = facts("DPO", tmp_path)
    other = {"beta": 0.5, "loss_type": ["ipo"], "dataset_num_proc": 2, "report_to": ["none"]}
    assert changed_facts(then, facts("DPO", tmp_path / "new", **other, logging_steps=7)) == [
        "beta: 0.1 -> 0.5",
        "loss_type: ['sigmoid'] -> ['ipo']",
    ]
    assert changed_facts({"seed": 0}, then) == []  # of an older version


@pytest.mark.parametrize(
    ("schedule", "warmup", "depends"),
    [
        ("linear", 0, True),
        ("cosine", 2, True),
        ("constant", 0.5, False),
        ("constant_with_warmup", 2, False),
        ("constant_with_warmup", 0.5, True),
    ],
)
def test_fault_094_another_length_is_told_where_the_schedule_depends_on_it(
    schedule: str, warmup: float, depends: bool, tmp_path: Path
) -> None:
    fields = {"lr_scheduler_type": schedule, "warmup_steps": warmup}
    then = facts("SFT", tmp_path, **fields)
    now = facts("SFT", tmp_path, **fields, max_steps=-1, num_train_epochs=9)
    assert changed_facts(then, now) == []
    said = changed_length(then, now)
    assert ("started with max_steps=4 and goes on with num_train_epochs=9" in said) is depends
    assert changed_length(then, then) == changed_length({}, now) == ""


def test_fault_094_a_longer_run_goes_on_with_a_warning(
    whole: tuple[Path, Any], tmp_path: Path
) -> None:
    longer = again(tmp_path, max_steps=6)
    with pytest.warns(UserWarning, match="started with max_steps=5 and goes on with max_steps=6"):
        longer.train(resume_from_checkpoint=str(whole[0] / "checkpoint-5"))
    assert longer.state.global_step == 6


class Hostile:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (os.system, (f"touch {self.target}",))


@pytest.mark.parametrize("marked", ["stale", "forged", "none"])
@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
def test_fault_095_a_hostile_pickle_is_refused_and_not_run(
    name: str, marked: str, whole: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, proof = copy_run(whole[0], tmp_path / "run"), tmp_path / "executed"
    torch.save({"state": Hostile(proof)}, folder / "checkpoint-5" / name)
    marker = folder / "checkpoint-5" / MARKER
    if marked == "none":
        marker.unlink()
    elif marked == "forged":
        said = json.loads(marker.read_text())
        del said["files"][name]
        marker.write_text(json.dumps(said))
    refusal = "not complete" if marked == "stale" else f"{name} holds more than tensors"
    with pytest.raises(TrainingError, match=refusal):
        again(tmp_path / "new").train(resume_from_checkpoint=str(folder / "checkpoint-5"))
    assert not proof.exists()
    # The file does what it says to a reader that trusts it.
    with pytest.raises((KeyError, TypeError, pickle.UnpicklingError, RuntimeError, AttributeError)):
        torch.load(folder / "checkpoint-5" / name, weights_only=False)["none"]
    assert proof.exists()


def test_fault_086_checkpoints_of_a_stock_trainer_with_the_callback_are_marked(
    tmp_path: Path,
) -> None:
    trainer = run(tmp_path, stock=True, callbacks=[MoeAdaptCallback()], max_steps=2)
    trainer.train()
    assert find_checkpoint(tmp_path).endswith("checkpoint-2")
    cut(tmp_path / "checkpoint-2" / "scheduler.pt")
    with pytest.warns(UserWarning, match=r"scheduler\.pt has \d+ bytes"):
        assert find_checkpoint(tmp_path).endswith("checkpoint-1")


@pytest.mark.parametrize(
    ("name", "change"),
    [(MARKER, {"format": 99}), ("trainer_state.json", {"log_history": 5})],
)
def test_fault_086_a_checkpoint_of_another_form_is_passed_over(
    name: str, change: dict[str, Any], whole: tuple[Path, Any], tmp_path: Path
) -> None:
    folder = copy_run(whole[0], tmp_path / "run")
    path = folder / "checkpoint-5" / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.warns(UserWarning, match=f"checkpoint-4, since .*{name}"):
        assert find_checkpoint(folder).endswith("checkpoint-4")
