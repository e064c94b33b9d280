"""Cases 108 and 109: every shipped recipe dry-runs, without a write or a connection."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moeadapt.training.objectives import OBJECTIVES
from tests.faults.cli import ROOT
from tests.faults.hub_cache import add_config, add_upcycled

RECIPES = sorted(p for p in ROOT.glob("configs/*/*.yaml") if p.parent.name in OBJECTIVES)

HUB = {
    "Qwen/Qwen3-0.6B": "qwen3",
    "Qwen/Qwen3-8B": "qwen3",
    "meta-llama/Llama-3.2-1B": "llama",
}
"""What the shipped recipes take from the hub."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Dry-run every recipe in one process; return what each said and did."""
    folder = tmp_path_factory.mktemp("dry")
    for name, architecture in HUB.items():
        add_config(folder / "home", name, architecture)
    add_upcycled(folder / "outputs/smollm2_moe")
    missing = folder / "sft" / "missing.yaml"
    missing.parent.mkdir()
    missing.write_text("model_name_or_path: nobody/nothing\noutput_dir: out\n")
    before = sorted(folder.rglob("*"))
    report = folder / "report.json"
    arguments = [str(report), *map(str, RECIPES), str(missing)]
    done = subprocess.run(
        [sys.executable, "-B", "-W", "ignore", "-m", "tests.faults.dry_runs", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "home")},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(set(folder.rglob("*")) - {report}) == before
    return json.loads(report.read_text())


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_fault_108_every_shipped_recipe_dry_runs(path: Path, found: dict[str, Any]) -> None:
    dry = found[str(path)]
    assert dry["code"] == 0, dry["output"]
    for label in ("trainable parameters", "adapter file", "would write to", "outputs/"):
        assert label in dry["output"]


def test_fault_109_a_dry_run_writes_nothing_and_connects_to_nothing(found: dict[str, Any]) -> None:
    assert {path: dry["events"] for path, dry in found.items() if dry["events"]} == {}


def test_fault_109_a_model_that_is_not_here_is_refused_with_the_place_looked_at(
    found: dict[str, Any],
) -> None:
    (dry,) = [dry for path, dry in found.items() if path.endswith("missing.yaml")]
    assert dry["code"] == 1
    said = " ".join(dry["output"].split())
    assert "the configuration of 'nobody/nothing' is not on this machine" in said
    assert "/home/hub" in said
    assert "`moeadapt plan` fetches it" in said
