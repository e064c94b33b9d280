"""The writer puts every matrix in its place, and gives a name only to what is complete."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from moeadapt.errors import ConfigError, ExportError
from moeadapt.export import writer as writer_module
from moeadapt.export.shards import Tensor, shards
from moeadapt.export.targets import Slot
from moeadapt.export.writer import INDEX, CheckpointWriter

PLAN = [
    Tensor("a", (3, 5), torch.float32),
    Tensor("b", (7,), torch.bfloat16),
    Tensor("stack", (2, 3, 4), torch.float16),
    Tensor("empty", (0, 4), torch.float32),
]


def values(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {t.name: torch.randn(t.shape, generator=generator).to(t.dtype) for t in PLAN}


@pytest.mark.parametrize("limit", [1, 70, 10_000])
def test_what_is_written_is_read_back_by_safetensors(limit, tmp_path):
    wanted = values()
    with CheckpointWriter(tmp_path / "out", PLAN, max_shard_bytes=limit) as writer:
        for name in reversed(wanted):
            writer.write(name, wanted[name])
        writer.finish()
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == {1: 4, 70: 2, 10_000: 1}[limit]
    found = {}
    for file in files:
        own = load_file(file)
        if len(files) > 1:
            weight_map = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
            assert {name for name, home in weight_map.items() if home == file.name} == set(own)
        found.update(own)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_close(found[name], value, rtol=0.0, atol=0.0)


def test_a_stack_is_written_matrix_by_matrix(tmp_path):
    value = values()["stack"]
    with CheckpointWriter(tmp_path / "out", [PLAN[2]]) as writer:
        for index in (1, 0):
            writer.write_matrix(Slot("stack", (2, 3, 4), (3, 4), index * 12), value[index])
        writer.finish()
    assert_close(load_file(tmp_path / "out/model.safetensors")["stack"], value, rtol=0.0, atol=0.0)


def begin(tmp_path):
    return CheckpointWriter(tmp_path / "out", PLAN)


def test_a_missing_tensor_is_an_error_and_leaves_nothing(tmp_path):
    message = r"2 tensors were not written, first \['b', 'stack'\]"
    with pytest.raises(ExportError, match=message), begin(tmp_path) as writer:
        writer.write("a", values()["a"])
        writer.finish()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("c", torch.zeros(1), "not part of the planned"),
        ("a", torch.zeros(5, 3), r"\(5, 3\)"),
        ("a", torch.full((3, 5), torch.nan), "NaN or infinity"),
        ("stack", torch.full((2, 3, 4), 1e6), r"infinity in torch\.float16"),
    ],
)
def test_a_wrong_tensor_is_an_error(name, value, message, tmp_path):
    with begin(tmp_path) as writer, pytest.raises(ExportError, match=message):
        writer.write(name, value)


def test_a_tensor_written_twice_is_an_error(tmp_path):
    with begin(tmp_path) as writer:
        writer.write("a", values()["a"])
        with pytest.raises(ExportError, match="written before"):
            writer.write("a", values()["a"])


def test_a_tensor_planned_twice_is_an_error():
    with pytest.raises(ExportError, match="planned twice"):
        shards([PLAN[0], PLAN[0]], 100)


def test_an_occupied_place_is_refused_and_an_empty_folder_is_not(tmp_path):
    (tmp_path / "out").mkdir()
    begin(tmp_path)
    (tmp_path / "out/file").write_text("mine")
    with pytest.raises(ConfigError, match="exists"):
        begin(tmp_path)


def test_a_place_taken_in_the_meantime_is_left_alone(tmp_path):
    with pytest.raises(ExportError, match="was taken"), begin(tmp_path) as writer:
        for name, value in values().items():
            writer.write(name, value)
        (tmp_path / "out").mkdir()
        (tmp_path / "out/file").write_text("mine")
        writer.finish()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "file"]


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = type(writer_module.shutil.disk_usage(tmp_path))(1000, 900, 100)
    monkeypatch.setattr(writer_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match="GB free"):
        CheckpointWriter(tmp_path / "below" / "out", PLAN)
    assert list(tmp_path.iterdir()) == []


def test_everything_is_flushed_before_the_folder_gets_its_name(tmp_path, monkeypatch):
    steps = []
    rename = os.rename
    monkeypatch.setattr(writer_module, "_sync", lambda path: steps.append(path.name))
    monkeypatch.setattr(os, "rename", lambda a, b: (steps.append("rename"), rename(a, b)))
    with begin(tmp_path) as writer:
        for name, value in values().items():
            writer.write(name, value)
        writer.write_json("config.json", {})
        writer.finish()
    assert steps == [
        "config.json", "model.safetensors", writer.folder.name, "rename", tmp_path.name,
    ]  # fmt: skip


def test_a_run_in_progress_is_left_alone_and_a_dead_one_is_removed(tmp_path):
    dead = tmp_path / ".out.partial-dead"
    dead.mkdir()
    other = tmp_path / ".out2.partial-dead"
    other.mkdir()
    with CheckpointWriter(tmp_path / "out", PLAN) as first:
        assert not dead.exists()
        with CheckpointWriter(tmp_path / "out", PLAN) as second:
            assert first.folder.exists()
            assert second.folder.exists()
    assert [path.name for path in tmp_path.iterdir()] == [other.name]
