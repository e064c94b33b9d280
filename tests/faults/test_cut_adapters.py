"""A killed or failed save of a model, with PEFT or transformers: the old adapter or the new one."""

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel

from moeadapt.adapter_format.adapter import AdapterFiles
from moeadapt.errors import ConfigError, ExportError
from tests.faults.killing import hidden, killed
from tests.faults.training.test_saving import small_files
from tests.tiny import adapted, batch, logits, tiny


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
        old.save_pretrained(str(tmp_path / "old"))
        new.save_pretrained(str(tmp_path / "new"))
        old, new = tiny("llama"), tiny("llama")
        old.load_adapter(str(tmp_path / "old"))
        new.load_adapter(str(tmp_path / "new"))
    seen = set()
    for point in range(0, 400, 4):
        target = tmp_path / f"{point}" / "run"
        (target / "checkpoint-1").mkdir(parents=True)
        old.save_pretrained(str(target))
        died = killed(lambda place=target: new.save_pretrained(str(place)), point)
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
    adapted("llama", "block").save_pretrained(str(tmp_path / "run"))
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
        adapted("llama", "block", seed=seed, lora_alpha=8 * seed).save_pretrained(str(folder))
        models.append(tiny("llama"))
        models[-1].load_adapter(str(folder))
    return models


@pytest.mark.parametrize("limit", [100, 1_000, 20_000])
def test_a_full_disk_leaves_a_natively_saved_adapter(
    limit: int, natives: list[Any], tmp_path: Path
) -> None:
    old, new = natives
    old.save_pretrained(str(tmp_path / "a"))
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    with small_files(limit), pytest.raises(ExportError, match="cannot write"):
        new.save_pretrained(str(tmp_path / "a"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    assert torch.equal(outputs(tmp_path / "a"), logits(old, batch()))
    assert hidden(tmp_path / "a") == []


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_native_files_get_the_mode_that_the_umask_says(
    umask: int, natives: list[Any], tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        natives[0].save_pretrained(str(tmp_path / "a"))
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "a").iterdir()}
    assert "moeadapt_manifest.json" in modes
    assert set(modes.values()) == {0o666 & ~umask}


def test_native_weights_in_parts_are_refused(natives: list[Any], tmp_path: Path) -> None:
    natives[0].save_pretrained(str(tmp_path / "a"))
    for wrong in ({"max_shard_size": 2000}, {"distributed_checkpoint": True}):
        with pytest.raises(ConfigError, match="leave it out"):
            natives[1].save_pretrained(str(tmp_path / "a"), **wrong)
    assert torch.equal(outputs(tmp_path / "a"), logits(natives[0], batch()))


def test_a_native_push_comes_after_the_save_and_keeps_its_keywords(
    natives: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed = []

    def push(repo_id: str, **kwargs: Any) -> None:
        pushed.append((repo_id, kwargs, (tmp_path / "a" / "moeadapt_manifest.json").is_file()))

    monkeypatch.setattr(natives[0], "push_to_hub", push)
    natives[0].save_pretrained(str(tmp_path / "a"), push_to_hub=True, token="t", private=True)
    natives[0].save_pretrained(str(tmp_path / "a"), True, None, True, repo_id="me/b")
    assert pushed == [("a", {"token": "t", "private": True}, True), ("me/b", {}, True)]


def test_saving_into_the_working_folder_leaves_it_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = tmp_path.stat().st_ino
    for seed in (1, 2):
        model = adapted("llama", "block", seed=seed)
        model.save_pretrained(".")
        assert Path(os.getcwd()).stat().st_ino == tmp_path.stat().st_ino == place
        assert torch.equal(outputs(Path(".")), logits(model, batch()))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    beside = [path.name for path in tmp_path.parent.iterdir()]
    assert not [name for name in beside if name.startswith(f".{tmp_path.name}")]
