"""A save that is killed at any point leaves the old adapter or the new one, and no orphans."""

import fcntl
import os
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel

from moeadapt import journal
from moeadapt.adapter_format.adapter import AdapterFiles
from moeadapt.errors import AdapterFileError, ConfigError, ExportError
from moeadapt.journal import recover
from moeadapt.whole_folder import whole_folder
from tests.faults.training.test_saving import small_files
from tests.tiny import adapted, batch, logits, tiny

FILES = ("README.md", "adapter_config.json", "adapter_model.safetensors", "other/adapter.bin")


def killed(save: Callable[[], Any], point: int) -> bool:
    """Run `save` in a child that is killed before its `point`-th step on the disk."""
    pid = os.fork()
    if pid == 0:
        left = [point]

        def strike(event: str, args: Any) -> None:
            if event == "open" or event.startswith(("os.", "shutil.", "ctypes.")):
                left[0] -= 1
                if left[0] == -1:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(strike)
            save()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def write(target: Path, text: str, settings: str) -> None:
    with whole_folder(target) as folder:
        (folder / "other").mkdir()
        for name in FILES:
            (folder / name).write_text(settings if name == "adapter_config.json" else text)


def state(folder: Path) -> list[str]:
    return [(folder / name).read_text() for name in FILES]


def hidden(folder: Path) -> list[Path]:
    return list(folder.parent.rglob(".*"))


@pytest.mark.parametrize("settings", ["same", "changed"])
@pytest.mark.parametrize("loaded", ["", "other"])
def test_beside_a_folder_every_point_of_a_killed_save_gives_old_or_new(
    settings: str, loaded: str, tmp_path: Path
) -> None:
    seen: list[str] = []
    for point in range(400):
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
    assert seen.count("old") > 10
    assert seen.count("new") > 10
    assert seen == sorted(seen, reverse=True)


def cut(target: Path, start: int = 0) -> Path:
    """Kill a save to `target` right after its journal is there; return the journal."""
    for point in range(start, 400):
        assert killed(lambda: write(target, "new", "changed"), point)
        if found := list(target.glob(".adapter.complete-*")):
            return found[0]
    raise AssertionError("no journal")


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
    for folder in (run, *run.parents[:2]):
        folder.chmod(0o755)
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


# --- with models


def outputs(folder: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(tiny("llama"), str(folder)), batch())


@pytest.mark.parametrize("kind", ["peft", "native"])
def test_a_killed_save_of_a_model_loads_as_the_old_or_the_new_one(
    kind: str, tmp_path: Path
) -> None:
    old, new = (
        adapted("llama", "block", seed=seed, lora_alpha=alpha) for seed, alpha in ((1, 8), (2, 16))
    )
    expected = {"old": logits(old, batch()), "new": logits(new, batch())}
    if kind == "native":
        old.save_pretrained(tmp_path / "old")
        new.save_pretrained(tmp_path / "new")
        old, new = tiny("llama"), tiny("llama")
        old.load_adapter(str(tmp_path / "old"))
        new.load_adapter(str(tmp_path / "new"))
    seen = set()
    for point in range(0, 400, 4):
        target = tmp_path / f"{point}" / "run"
        (target / "checkpoint-1").mkdir(parents=True)
        old.save_pretrained(target)
        died = killed(lambda place=target: new.save_pretrained(place), point)
        found = outputs(target)
        name = next(name for name, tensor in expected.items() if torch.equal(found, tensor))
        seen.add(name)
        if not died:
            break
    assert seen == {"old", "new"}


@pytest.mark.parametrize(
    "load",
    [
        lambda folder: PeftModel.from_pretrained(tiny("llama"), str(folder)),
        lambda folder: tiny("llama").load_adapter(str(folder)),
        lambda folder: PeftConfig.from_pretrained(str(folder)),
        lambda folder: AdapterFiles(folder).close(),
    ],
)
def test_every_way_to_load_completes_a_cut_save(load: Any, tmp_path: Path) -> None:
    adapted("llama", "block").save_pretrained(tmp_path / "run")
    left = tmp_path / "run" / ".adapter.complete-0123abcd"
    left.mkdir()
    for path in (tmp_path / "run").iterdir():
        if path.is_file():
            path.rename(left / path.name)
    load(tmp_path / "run")
    assert hidden(tmp_path / "run") == []
    assert (tmp_path / "run" / "adapter_config.json").is_file()


@pytest.fixture(scope="module")
def natives(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    models = []
    for seed in (1, 2):
        folder = tmp_path_factory.mktemp("native")
        adapted("llama", "block", seed=seed, lora_alpha=8 * seed).save_pretrained(folder)
        models.append(tiny("llama"))
        models[-1].load_adapter(str(folder))
    return models


@pytest.mark.parametrize("limit", [100, 1_000, 20_000])
def test_a_full_disk_leaves_a_natively_saved_adapter(
    limit: int, natives: list[Any], tmp_path: Path
) -> None:
    old, new = natives
    old.save_pretrained(tmp_path / "a")
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    with small_files(limit), pytest.raises(ExportError, match="cannot write"):
        new.save_pretrained(tmp_path / "a")
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    assert torch.equal(outputs(tmp_path / "a"), logits(old, batch()))
    assert hidden(tmp_path / "a") == []


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_native_files_get_the_mode_that_the_umask_says(
    umask: int, natives: list[Any], tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        natives[0].save_pretrained(tmp_path / "a")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "a").iterdir()}
    assert "moeadapt_manifest.json" in modes
    assert set(modes.values()) == {0o666 & ~umask}


def test_native_weights_in_parts_are_refused(natives: list[Any], tmp_path: Path) -> None:
    natives[0].save_pretrained(tmp_path / "a")
    for wrong in ({"max_shard_size": 2000}, {"distributed_checkpoint": True}):
        with pytest.raises(ConfigError, match="leave it out"):
            natives[1].save_pretrained(tmp_path / "a", **wrong)
    assert torch.equal(outputs(tmp_path / "a"), logits(natives[0], batch()))


def test_a_native_push_comes_after_the_save_and_keeps_its_keywords(
    natives: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed = []

    def push(repo_id: str, **kwargs: Any) -> None:
        pushed.append((repo_id, kwargs, (tmp_path / "a" / "moeadapt_manifest.json").is_file()))

    monkeypatch.setattr(natives[0], "push_to_hub", push)
    natives[0].save_pretrained(tmp_path / "a", push_to_hub=True, token="t", private=True)
    natives[0].save_pretrained(tmp_path / "a", True, None, True, repo_id="me/b")
    assert pushed == [("a", {"token": "t", "private": True}, True), ("me/b", {}, True)]
