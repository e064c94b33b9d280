"""A save that is killed at any point leaves the old adapter or the new one, and no orphans."""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moeadapt import journal
from moeadapt.errors import AdapterFileError, ExportError
from moeadapt.journal import recover
from moeadapt.whole_folder import whole_folder
from tests.faults.killing import hidden, killed

FILES = ("README.md", "adapter_config.json", "adapter_model.safetensors", "other/adapter.bin")


def write(target: Path, text: str, settings: str) -> None:
    with whole_folder(target) as folder:
        (folder / "other").mkdir()
        for name in FILES:
            (folder / name).write_text(settings if name == "adapter_config.json" else text)


def state(folder: Path) -> list[str]:
    return [(folder / name).read_text() for name in FILES]


@pytest.mark.parametrize(
    ("settings", "loaded", "step"), [("changed", "", 1), ("same", "", 3), ("changed", "other", 3)]
)
def test_beside_a_folder_every_point_of_a_killed_save_gives_old_or_new(
    settings: str, loaded: str, step: int, tmp_path: Path
) -> None:
    seen: list[str] = []
    for point in range(0, 400, step):
        target = tmp_path / f"{point}" / "run"
        (target / "checkpoint-1").mkdir(parents=True)
        write(target, "old", "same")
        died = killed(lambda place=target: write(place, "new", settings), point)
        recover(target / loaded)
        found = state(target)
        assert found in (["old", "same", "old", "old"], ["new", settings, "new", "new"]), point
        seen.append(found[0])
        recover(target)
        write(target, "next", settings)
        assert state(target) == ["next", settings, "next", "next"]
        assert hidden(target) == []
        if not died:
            break
    assert seen.count("old") > 5
    assert seen.count("new") > 5
    assert seen == sorted(seen, reverse=True)


def cut(target: Path) -> Path:
    """Stop a save to `target` right after its journal is there; return the journal."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("moeadapt.whole_folder.put_files", stop)
        write(target, "new", "changed")
    (found,) = target.glob(".adapter.complete-*")
    return found


def stop(journal: Path) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def run(tmp_path: Path) -> Path:
    target = tmp_path / "run"
    (target / "checkpoint-1").mkdir(parents=True)
    write(target, "old", "same")
    return target


def test_the_next_save_needs_no_reader_before_it(run: Path) -> None:
    cut(run)
    write(run, "next", "next")
    assert state(run) == ["next"] * 4
    assert hidden(run) == []


def test_a_journal_of_a_living_process_is_left_to_it(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = cut(run)
    monkeypatch.setattr(journal, "PATIENCE", 0.05)
    before = state(run)
    lock = os.open(left, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for act in (lambda: recover(run), lambda: write(run, "next", "next")):
            with pytest.raises(AdapterFileError, match="another process has been saving here"):
                act()
        assert state(run) == before
    finally:
        os.close(lock)
    recover(run)
    assert state(run) == ["new", "changed", "new", "new"]


@contextmanager
def nobody() -> Iterator[None]:
    """Be a user who may write nothing; root may write anywhere."""
    uid = os.geteuid()
    if uid == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if uid == 0:
            os.seteuid(0)


def test_who_cannot_write_is_told_where_the_files_are(run: Path) -> None:
    left = cut(run)
    for parent in run.parents:
        if tempfile.gettempdir() in map(str, parent.parents):
            parent.chmod(0o755)  # pytest makes its own unreadable for others
    before = state(run)
    run.chmod(0o555)
    left.chmod(0o555)
    with nobody(), pytest.raises(AdapterFileError, match=rf"complete in .*{left.name}: copy them"):
        recover(run)
    run.chmod(0o755)
    left.chmod(0o755)
    assert state(run) == before
    recover(run)
    assert hidden(run) == []


def test_no_link_is_followed(run: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("mine")
    left = run / ".adapter.complete-0123abcd"
    left.mkdir()
    for name in ("in", "out"):
        (run / name).mkdir()
    (left / "in").symlink_to(secret)
    with pytest.raises(AdapterFileError, match="is a link"):
        recover(run)
    (left / "in").unlink()
    (left / "out").mkdir()
    (left / "out" / "key").write_text("theirs")
    (run / "out").rmdir()
    (run / "out").symlink_to(secret)
    with pytest.raises(AdapterFileError, match="is a link"):
        recover(run)
    assert [path.read_text() for path in secret.iterdir()] == ["mine"]


def test_a_folder_where_a_file_belongs_is_found_before_anything_changes(run: Path) -> None:
    (run / "README.md").unlink()
    (run / "README.md").mkdir()
    with pytest.raises(ExportError, match=r"README\.md is a folder|Is a directory"):
        write(run, "new", "changed")
    assert (run / "adapter_config.json").read_text() == "same"
    assert hidden(run) == []


def test_cut_manifests_go_with_the_next_save(run: Path) -> None:
    for name in (".moeadapt_manifest.json.17", ".moeadapt_manifest.json.partial-0123abcd"):
        (run / name).write_text("{")
    write(run, "next", "next")
    assert hidden(run) == []
