"""Two processes log and learn what one process does on the same rows."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training import worker


def free_port() -> int:
    """Return a port that nobody uses at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the worker in two processes and return what they wrote."""
    folder = tmp_path_factory.mktemp("two")
    root = Path(__file__).parents[2]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.training.worker", str(folder)],
            cwd=root,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
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
