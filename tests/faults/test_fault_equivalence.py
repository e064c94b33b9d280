"""Cases 64, 65, 78, 79 and 80: runs that ought to be the same run are, over 50 steps.

Tolerances: losses differ by 1e-3 at most, and by 1e-5 on average.
"""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tests.faults import runs
from tests.faults.cli import ROOT
from tests.training.kit import run_two

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:(torch|transformers|peft|accelerate)"),
]

ranks = pytest.mark.parametrize("rank", [0, 1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[Any]]:
    """Train every run of one process, and beside it those of two; return what each found."""
    alone, together = (tmp_path_factory.mktemp(name) for name in ("alone", "together"))
    command = [sys.executable, "-W", "ignore", "-m", "tests.faults.runs", str(alone)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        run_two("tests.faults.runs", together)
        assert process.wait(timeout=180) == 0
    reports = [torch.load(together / f"report-{rank}.pt") for rank in range(2)]
    return torch.load(alone / "report.pt"), reports


@pytest.fixture(scope="module")
def single(trained: tuple[Any, list[Any]]) -> dict[str, Any]:
    """Return what the runs of one process found."""
    return trained[0]


@pytest.fixture(scope="module")
def double(trained: tuple[Any, list[Any]]) -> list[dict[str, Any]]:
    """Return what each of two processes found."""
    return trained[1]


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Compare two trajectories."""
    difference = (one["loss"] - other["loss"]).abs()
    assert len(difference) == runs.STEPS
    assert difference.max() <= 1e-3
    assert difference.mean() <= 1e-5
    assert one["loss"][-10:].mean() < one["loss"][:10].mean() - 0.3, "nothing was learned"


@pytest.mark.parametrize("mode", runs.CHECKPOINTED)
def test_fault_064_checkpointing_gives_the_same_trajectory(
    mode: str, single: dict[str, Any]
) -> None:
    assert_same(single["2x2"], single[f"2x2 {mode}"])
    # Recomputation in backward must count no token twice, nor any loss.
    for plain, again in zip(
        single["2x2"]["metrics"], single[f"2x2 {mode}"]["metrics"], strict=True
    ):
        assert again == pytest.approx(plain, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("division", ["token 2x2", "token 1x4"])
def test_fault_065_batch_times_accumulation_gives_the_same_trajectory(
    division: str, single: dict[str, Any]
) -> None:
    assert_same(single["token 4x1"], single[division])


@ranks
@pytest.mark.parametrize(
    ("one", "two"),
    [("2x2", "2 x 2x1"), ("token 4x1", "token 2 x 2x1"), ("token 1x4", "token 2 x 2x1")],
)
def test_fault_065_two_processes_give_the_same_trajectory(
    one: str, two: str, rank: int, single: dict[str, Any], double: list[dict[str, Any]]
) -> None:
    assert_same(single[one], double[rank][two])


@ranks
@pytest.mark.parametrize("mode", runs.CHECKPOINTED)
def test_fault_079_two_processes_with_checkpointing_give_the_same_trajectory(
    mode: str, rank: int, single: dict[str, Any], double: list[dict[str, Any]]
) -> None:
    assert_same(single["2x2"], double[rank][f"2 x 2x1 {mode}"])


@ranks
def test_fault_080_load_statistics_of_two_processes_are_those_of_the_union(
    rank: int, single: dict[str, Any], double: list[dict[str, Any]]
) -> None:
    union, shared = single["token 4x1"]["metrics"], double[rank]["token 2 x 2x1"]["metrics"]
    assert len(union) == len(shared) == runs.STEPS
    assert any("load" in name for name in union[0])
    assert shared[0] == pytest.approx(union[0], rel=1e-6)
    for one, other in zip(union, shared, strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-5)


@ranks
def test_fault_078_ddp_survives_processes_without_a_common_expert(
    rank: int, double: list[dict[str, Any]]
) -> None:
    expected = []
    for token in runs.disjoint_tokens(runs.disjoint_model()):
        expected.append(runs.gradients(runs.disjoint_model(), token))
    mean = {name: (expected[0][name] + expected[1][name]) / 2 for name in expected[0]}
    shared = double[rank]["disjoint ddp"]
    assert shared.keys() == mean.keys()
    for name, value in mean.items():
        assert_close(shared[name], value, msg=lambda text, n=name: f"{n}: {text}")


@ranks
def test_fault_078_a_trainer_with_default_arguments_survives_it_too(
    rank: int, single: dict[str, Any], double: list[dict[str, Any]]
) -> None:
    expected, shared = single["disjoint"], double[rank]["disjoint"]
    assert_close(shared["loss"], expected["loss"])
    for name, value in expected["adapter"].items():
        assert_close(shared["adapter"][name], value, rtol=1e-3, atol=1e-5)
