"""The writer puts every matrix in its place, and gives a name only to what is complete."""

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from moeadapt import hidden_folder
from moeadapt.errors import ConfigError, ExportError
from moeadapt.export.shards import PlannedTensor, shards
from moeadapt.export.targets import Place
from moeadapt.export.writer import INDEX, CheckpointWriter

PLAN = [
    PlannedTensor("a", (3, 5), torch.float32),
    PlannedTensor("b", (7,), torch.bfloat16),
    PlannedTensor("stack", (2, 3, 4), torch.float16),
    PlannedTensor("empty", (0, 4), torch.float32),
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
            writer.write_matrix(Place("stack", (2, 3, 4), (3, 4), index * 12), value[index])
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
    usage = type(shutil.disk_usage(tmp_path))(1000, 900, 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match="GB free"):
        CheckpointWriter(tmp_path / "below" / "out", PLAN)
    assert list(tmp_path.iterdir()) == []


def test_everything_is_flushed_before_the_folder_gets_its_name(tmp_path, monkeypatch):
    steps = []
    rename = os.rename
    monkeypatch.setattr(hidden_folder, "sync", lambda path: steps.append(path.name))
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


def test_a_matrix_written_twice_does_not_stand_for_another(tmp_path):
    value = values()["stack"]
    with CheckpointWriter(tmp_path / "out", [PLAN[2]]) as writer:
        writer.write_matrix(Place("stack", (2, 3, 4), (3, 4), 0), value[0])
        for start in (0, 6):
            with pytest.raises(ExportError, match=f"matrix at {start} was written before"):
                writer.write_matrix(Place("stack", (2, 3, 4), (3, 4), start), value[0])
        with pytest.raises(ExportError, match="not written"):
            writer.finish()


@pytest.mark.parametrize("start", [-1, 13])
def test_a_matrix_outside_its_tensor_is_an_error(start, tmp_path):
    value = values()["stack"]
    with begin(tmp_path) as writer, pytest.raises(ExportError, match="is outside"):
        writer.write_matrix(Place("stack", (2, 3, 4), (3, 4), start), value[0])


def fails_with(number):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(("where", "call"), [(os, "pwrite"), (os, "truncate"), (Path, "mkdir")])
def test_a_disk_that_fails_at_the_start_is_an_export_error_and_leaves_nothing(
    where, call, tmp_path, monkeypatch
):
    failing = begin(tmp_path)
    monkeypatch.setattr(where, call, fails_with(errno.ENOSPC))
    with pytest.raises(ExportError, match=r"cannot write .*out.*free space below"), failing:
        pass
    assert list(tmp_path.iterdir()) == []
    still_open = [os.path.realpath(file) for file in Path("/proc/self/fd").glob("*")]
    assert not [file for file in still_open if str(tmp_path) in file]


def test_a_disk_that_fails_later_is_an_export_error_that_names_the_file(tmp_path, monkeypatch):
    wanted, base = values(), tmp_path / "base"
    base.mkdir()
    (base / "vocab.json").write_text("{}")
    with pytest.raises(ExportError, match="written"), begin(tmp_path) as writer:
        for name, value in wanted.items():
            with monkeypatch.context() as patched:
                patched.setattr(os, "pwrite", fails_with(errno.EDQUOT))
                if value.numel():
                    with pytest.raises(ExportError, match=r"model\.safetensors: .*free space"):
                        writer.write(name, value)
            writer.write(name, value)  # nothing counts as written that is not on disk
        for number, hint in ((errno.EFBIG, "lower max_shard_bytes"), (errno.EIO, "check that")):
            with monkeypatch.context() as patched:
                patched.setattr(shutil, "copyfile", fails_with(number))
                patched.setattr(Path, "write_text", fails_with(number))
                patched.setattr(os, "fsync", fails_with(number))
                for step in (
                    lambda: writer.copy_companions(base),
                    lambda: writer.write_json("config.json", {}),
                    writer.finish,
                ):
                    with pytest.raises(ExportError, match=f"cannot write .*{hint}"):
                        step()
        raise ExportError("written")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_cleanup_that_comes_between_making_and_locking_is_survived(tmp_path, monkeypatch):
    lock, seen = hidden_folder._lock, []

    def slow(folder):
        if not seen:  # another run locks it first, and removes it
            other = lock(folder)
            taken = lock(folder)
            assert taken is None
            shutil.rmtree(folder)
            os.close(other)
        elif len(seen) == 1:  # another run has removed it altogether
            shutil.rmtree(folder)
        seen.append(folder)
        return lock(folder)

    writer = begin(tmp_path)
    monkeypatch.setattr(hidden_folder, "_lock", slow)
    with writer:
        assert len(set(seen)) == 3
        assert writer.folder == seen[2]
        monkeypatch.undo()
        assert lock(writer.folder) is None
        for name, value in values().items():
            writer.write(name, value)
        writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_others_always_take_is_an_error(tmp_path, monkeypatch):
    writer = begin(tmp_path)

    def taken(folder):
        shutil.rmtree(folder)

    monkeypatch.setattr(hidden_folder, "_lock", taken)
    with pytest.raises(ExportError, match="try again"), writer:
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_gets_its_name_during_the_cleanup_is_no_error(tmp_path, monkeypatch):
    listed = tmp_path / ".out.partial-done"
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [listed])
    begin(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_locks_is_written_and_its_leftovers_are_left(tmp_path, monkeypatch):
    (tmp_path / ".out.partial-other").mkdir()
    monkeypatch.setattr(fcntl, "flock", fails_with(errno.ENOLCK))
    with begin(tmp_path) as writer:
        for name, value in values().items():
            writer.write(name, value)
        writer.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial-other", "out"]
