"""Two processes log and learn what one process does on the same rows."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training import worker
from tests.training.kit import run_two


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the worker in two processes and return what they wrote."""
    folder = tmp_path_factory.mktemp("two")
    run_two("tests.training.worker", folder)
    return folder


def reports(folder: Path) -> list[dict[str, Any]]:
    """Read what each process saw."""
    return [json.loads((folder / f"report-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("kind", worker.KINDS)
def test_two_processes_equal_two_accumulated_micro_batches(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    metrics, adapter = worker.train(kind, tmp_path, gradient_accumulation_steps=2)
    for rank, report in enumerate(reports(folder)):
        assert report[kind] == pytest.approx(metrics, rel=1e-5)
        found = torch.load(folder / f"adapters-{rank}.pt")[kind]
        assert found.keys() == adapter.keys()
        for name, tensor in adapter.items():
            torch.testing.assert_close(
                found[name], tensor, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_a_repair_that_comes_after_the_wrapper_is_refused(folder: Path) -> None:
    for report in reports(folder):
        assert "callbacks=[MoeAdaptCallback()]" in report["late"]


def test_mixin_and_callback_need_no_trl(folder: Path) -> None:
    assert not any(report["trl"] for report in reports(folder))
