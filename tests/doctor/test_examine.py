"""Each damage is found by its check, with what, why and what to do; a whole adapter has none."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moeadapt.doctor import environment
from moeadapt.doctor.checks import CHECKS
from moeadapt.doctor.examine import examine
from moeadapt.doctor.finding import Finding
from moeadapt.errors import ConfigError
from tests.faults.loading_kit import (
    MANIFEST,
    SETTINGS,
    WEIGHTS,
    A,
    edit_header,
    edit_settings,
    edit_tensors,
    fresh,
    shelf,
)
from tests.tiny import saved_base


def problems(folder: Path | None, base: str | None = None) -> list[Finding]:
    return [f for f in examine(folder, base) if f.level in ("warning", "error")]


def flip(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-3] ^= 4
    (folder / WEIGHTS).write_bytes(content)


def outside(folder: Path) -> None:
    (folder.parent / "secret").write_text("x")
    (folder / "notes.txt").symlink_to(folder.parent / "secret")


def replaced(name: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)

    return change


VAST = {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}
"""Without a number, and more than torch can count."""

DAMAGE: dict[str, tuple[Callable[[Path], Any], str, str, str]] = {
    "nothing": (lambda f: (f / SETTINGS).unlink(), "files", "error", "holds neither"),
    "json": (lambda f: (f / SETTINGS).write_text("{"), "settings", "error", "line 1"),
    "field": (lambda f: edit_settings(f, r=-1), "settings", "error", "r=-1"),
    "unknown": (lambda f: edit_settings(f, moo=1), "settings", "warning", "unknown fields"),
    "foreign": (
        lambda f: edit_settings(f, peft_type="LORA"),
        "settings",
        "error",
        "of another adapter",
    ),
    "rank": (lambda f: edit_settings(f, r=10**6), "header", "error", "r=1000000"),
    "cut": (lambda f: os.truncate(f / WEIGHTS, 900), "header", "error", "cut off"),
    "weights": (lambda f: (f / WEIGHTS).unlink(), "header", "error", "has no adapter_model"),
    "lost": (
        lambda f: edit_tensors(f, lambda t: t.pop(A) is None or None),
        "factors",
        "error",
        f"lacks 1 tensors that its other layers have: {A}",
    ),
    "manifest": (lambda f: (f / MANIFEST).write_text("[]"), "manifest", "error", "no object"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "manifest", "warning", "has no"),
    "flip": (flip, "sha256", "error", "is not as it was saved"),
    "nan": (
        lambda f: edit_tensors(f, lambda t: t[A].view(-1)[:1].fill_(torch.nan) and None),
        "numbers",
        "error",
        "1 NaN",
    ),
    "large": (
        lambda f: edit_tensors(f, lambda t: t[A].view(-1)[:1].fill_(1e20) and None),
        "numbers",
        "warning",
        "overflow",
    ),
    "vast": (
        lambda f: edit_header(f, lambda h: h.update(x=VAST)),
        "header",
        "error",
        "must multiply to less than",
    ),
    "pickle": (lambda f: (f / "adapter_model.bin").write_bytes(b""), "pickles", "warning", "bin"),
    "link": (outside, "links", "warning", "outside the folder"),
    "linked weights": (replaced(WEIGHTS), "links", "error", "outside the folder"),
    "mode": (lambda f: (f / WEIGHTS).chmod(0o666), "modes", "warning", "every user"),
    "private": (lambda f: (f / WEIGHTS).chmod(0o600), "modes", "warning", "fewer users"),
    "left in it": (lambda f: (f / f".{MANIFEST}.17").touch(), "leftovers", "warning", "was left"),
    "journal": (
        lambda f: (f / ".adapter.complete-0123abcd").mkdir(),
        "leftovers",
        "warning",
        "save that was cut",
    ),
    "left beside": (
        lambda f: (f.parent / f".{f.name}.partial-0123abcd").mkdir(),
        "leftovers",
        "warning",
        "was left",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_each_damage_is_found_and_explained(tmp_path, name):
    damage, check, level, words = DAMAGE[name]
    folder = fresh(tmp_path)
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)
    assert not [f for f in problems(folder) if f.check not in ENVIRONMENT]
    damage(folder)
    found = [f for f in problems(folder) if f.check == check]
    assert found, problems(folder)
    assert {f.level for f in found} == {level}
    assert words in found[0].what
    assert found[0].why


ENVIRONMENT = {name for name, check in CHECKS.items() if check.scope == "environment"}


def test_one_damage_does_not_hide_another(tmp_path):
    folder = fresh(tmp_path)
    edit_tensors(folder, lambda t: [t[n].view(-1)[:1].fill_(torch.inf) for n in t] and None)
    edit_settings(folder, r=-1)
    flip(folder)
    found = {f.check for f in problems(folder)}
    assert {"settings", "sha256", "numbers"} <= found
    assert len([f for f in problems(folder) if f.check == "numbers"]) > 2


def test_what_was_not_looked_at_is_not_called_right(tmp_path):
    folder = fresh(tmp_path)
    (folder / MANIFEST).unlink()
    os.truncate(folder / WEIGHTS, 900)
    levels = {f.check: f.level for f in examine(folder)}
    assert levels["sha256"] == levels["numbers"] == "skipped"


def test_the_base_it_was_trained_on_is_told_from_another(tmp_path):
    folder = fresh(tmp_path)
    base = str(shelf() / "base")
    assert not [f for f in problems(folder, base) if f.check in ("base", "fits")]
    (right,) = [f for f in examine(folder, base) if f.check == "base"]
    assert "equal bitwise" in right.what
    from tests.toy import toy_tokenizer

    other = saved_base("llama", tmp_path, seed=3)
    toy_tokenizer().save_pretrained(other)
    found = {f.check: f for f in problems(folder, other)}
    assert "another base" in found["base"].what
    assert "fits" not in found  # the shapes are the same
    edit_tensors(folder, lambda t: {**t, "lm_head.weight": torch.ones(2)})
    found = {f.check: f for f in problems(folder, base)}
    assert "lm_head" in found["fits"].what
    flip(folder)
    assert {f.check: f.level for f in examine(folder, base)}["fits"] == "skipped"


@pytest.mark.parametrize(
    ("marker", "words"),
    [
        ({"files": {"a": {}}}, "a is missing"),
        ({"files": {SETTINGS: 3}}, "damaged"),
        ({"files": {"x" * 5000: {}}}, "damaged"),
        ("[" * 10**5, "damaged"),
        ({"files": 3}, "damaged"),
        ({"files": {"../adapter": {}}}, "damaged"),
    ],
)
def test_a_checkpoint_with_any_marker_is_explained(tmp_path, marker, words):
    run = tmp_path / "run"
    folder = fresh(run).rename(run / "checkpoint-3")
    (folder / "trainer_state.json").write_text('{"global_step": 3}')
    assert any("has no moeadapt_checkpoint.json" in f.what for f in problems(folder))
    text = marker if isinstance(marker, str) else json.dumps(marker)
    (folder / "moeadapt_checkpoint.json").write_text(text)
    found = [f for f in problems(run) if f.check == "checkpoint" and f.level == "error"]
    assert any(words in f.what for f in found), found
    assert any("optimizer.pt" in f.what for f in problems(run))


def test_a_hostile_optimizer_is_an_error(tmp_path):
    folder = fresh(tmp_path)
    (folder / "trainer_state.json").write_text('{"global_step": 3}')
    torch.save({"x": Path("x")}, folder / "optimizer.pt")
    (found,) = [f for f in problems(folder) if "optimizer.pt" in f.what]
    assert found.level == "error"
    assert "more than tensors" in found.what


@pytest.mark.parametrize(
    ("name", "version", "level"),
    [("peft", "0.1.0", "error"), ("peft", None, "error"), ("trl", "0.1", "warning")],
)
def test_packages_out_of_range_are_found(monkeypatch, name, version, level):
    original = environment._version
    monkeypatch.setattr(environment, "_version", lambda n: version if n == name else original(n))
    found = [f for f in problems(None) if f.what.startswith(f"{name}:")]
    assert found
    assert found[0].level == level
    assert found[0].cure.startswith(f"pip install '{name}")


def test_a_loading_function_that_was_replaced_is_an_error(monkeypatch):
    from peft import PeftModel

    monkeypatch.setattr(PeftModel, "load_adapter", lambda *_: None)
    assert any("replaced" in f.what and f.level == "error" for f in problems(None))


def test_a_check_that_fails_is_an_error_and_hides_no_other(tmp_path, monkeypatch):
    def fail(subject):
        raise TypeError("unforeseen")

    monkeypatch.setitem(CHECKS, "settings", replace(CHECKS["settings"], run=fail))
    found = {f.check: f for f in examine(fresh(tmp_path))}
    assert found["settings"].level == "error"
    assert "could not be looked at: TypeError: unforeseen" in found["settings"].what
    assert found["sha256"].level == "ok"


def test_what_is_no_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is no folder"):
        examine(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="give its folder"):
        examine(None, "base")
