"""The log of a trainer is found, read and refused."""

import json

import pytest

from moeadapt.errors import ConfigError
from moeadapt.report.training_log import read_training_log

HISTORY = [
    {"step": 10, "loss": 2.5, "moe/load_max": 1.5, "grad_norm": 3.0, "epoch": 0.1},
    {"step": 5, "loss": 3.0, "moe/entropy": float("nan")},
    {"step": 10, "eval_loss": 2.4},
    {"step": 15, "eval_loss": 2.3},
    {"step": 20, "loss": True, "moe/active_experts": 2},
    {"loss": 1.0},
]


def write(folder, history=HISTORY):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    return folder / "trainer_state.json"


def test_loss_and_router_metrics_are_read_in_order(tmp_path):
    points = read_training_log(write(tmp_path))
    assert [(point.step, point.values) for point in points] == [
        (5, {"loss": 3.0}),
        (10, {"loss": 2.5, "moe/load_max": 1.5}),
        (20, {"moe/active_experts": 2.0}),
    ]


def test_a_folder_and_its_last_checkpoint_are_looked_into(tmp_path):
    for step in (9, 10, 100):
        write(tmp_path / f"checkpoint-{step}", [{"step": step, "loss": 1.0}])
    (tmp_path / "checkpoint-200").mkdir()
    assert [point.step for point in read_training_log(tmp_path)] == [100]
    write(tmp_path, [{"step": 7, "loss": 1.0}])
    assert [point.step for point in read_training_log(str(tmp_path))] == [7]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged"),
        ("[]", "no log_history"),
        ('{"log_history": 3}', "no log_history"),
        (b"\xff\xfe", "damaged"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, text, message):
    data = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "trainer_state.json").write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        read_training_log(tmp_path)


def test_a_place_without_a_log_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="hold no trainer_state.json"):
        read_training_log(tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        read_training_log(tmp_path / "nowhere")
