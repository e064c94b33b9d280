"""A folder appears whole or not at all, and killed runs leave nothing that stays."""

import os
import signal
import subprocess
import sys

import pytest

from moeadapt import hidden_folder
from moeadapt.errors import ConfigError, ExportError
from moeadapt.hidden_folder import check_folder, new_folder

HOLD = """
import sys, time
from moeadapt.hidden_folder import new_folder
with new_folder(sys.argv[1], 0) as folder:
    (folder / "half.txt").write_text("half")
    print(folder, flush=True)
    time.sleep(600)
"""


def hold(out):
    """Start a process that is busy writing `out`; return it and its hidden folder."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True
    )
    return process, process.stdout.readline().strip()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_run_left_is_removed_by_the_next_one_and_what_is_in_use_is_not(tmp_path):
    out = tmp_path / "out[1]"
    process, hidden = hold(out)
    try:
        with new_folder(out, 0) as folder:
            assert os.path.exists(hidden)
            assert folder.parent == tmp_path
        out.rmdir()
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert names(tmp_path) == [os.path.basename(hidden)]
    with new_folder(out, 0) as folder:
        (folder / "whole.txt").write_text("whole")
        assert names(tmp_path) == [folder.name]
    assert names(tmp_path) == ["out[1]"]
    assert names(out) == ["whole.txt"]


def test_leftovers_of_other_names_and_files_stay(tmp_path):
    (tmp_path / ".other.partial-0").mkdir()
    (tmp_path / ".out.partial-file").write_text("mine")
    with new_folder(tmp_path / "out", 0):
        pass
    assert names(tmp_path) == [".other.partial-0", ".out.partial-file", "out"]


def test_everything_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    synced = []

    def sync(file):
        synced.append((os.path.basename(os.readlink(f"/proc/self/fd/{file}")), out.exists()))

    out = tmp_path / "out"
    monkeypatch.setattr(hidden_folder.os, "fsync", sync)
    with new_folder(out, 0) as folder:
        (folder / "expert_0").mkdir()
        (folder / "expert_0" / "weights").write_text("w")
        (folder / "config").write_text("c")
    *before, last = synced
    wanted = [("config", False), ("expert_0", False), ("weights", False), (folder.name, False)]
    assert sorted(before) == sorted(wanted)
    assert before[-1] == (folder.name, False)
    assert last == (tmp_path.name, True)


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), new_folder(tmp_path / "out", 0) as folder:
        (folder / "half").write_text("half")
        raise KeyError
    assert names(tmp_path) == []


def test_an_occupied_place_is_wrong_input(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for place, message in (
        (tmp_path, "not an empty folder"),
        (tmp_path / "file", "not an empty folder"),
        (tmp_path / "file" / "a" / "b", "is a file"),
        (tmp_path / "link", "is a link"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_folder(place)
        with pytest.raises(ConfigError, match=message), new_folder(place, 0):
            pass
    check_folder(tmp_path / "new" / "folder")
    assert names(tmp_path) == ["file", "link"]


def test_a_full_disk_is_wrong_input(tmp_path):
    with pytest.raises(ConfigError, match="free some"), new_folder(tmp_path / "out", 1 << 60):
        pass
    assert names(tmp_path) == []


def test_a_place_taken_meanwhile_is_not_overwritten(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ExportError, match="was taken"), new_folder(out, 0):
        out.mkdir()
        (out / "theirs").write_text("theirs")
    assert names(tmp_path) == ["out"]
    assert names(out) == ["theirs"]


def test_a_place_that_cannot_be_is_said_so(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="cannot look at"), new_folder(tmp_path / ("x" * 300), 0):
        pass

    def refused(self, **options):
        raise PermissionError("not yours")

    monkeypatch.setattr(hidden_folder.Path, "mkdir", refused)
    with pytest.raises(ExportError, match=r"cannot write .*not yours"):
        new_folder(tmp_path / "out", 0).__enter__()
