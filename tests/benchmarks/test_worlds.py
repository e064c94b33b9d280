"""The two worlds have the optimum that they say, and adapters behave in them as they must."""

import pytest
import torch
from torch.testing import assert_close

from benchmarks.evidence import two_worlds
from benchmarks.evidence.worlds import CUE, D, K, World, r

SAMPLES = 60_000


@pytest.mark.parametrize("seed", [0, 1])
def test_the_bound_of_the_conflict_is_what_least_squares_finds(seed):
    world = World.draw("conflict", seed)
    x, y, _ = world.sample(SAMPLES, 0)
    best = torch.linalg.lstsq(x.double(), y.double()).solution
    x, y, _ = world.sample(SAMPLES, 1)
    left = (x.double() @ best - y).square().sum() / y.double().square().sum()
    assert_close(float(left), world.bound, rtol=0.03, atol=0)
    assert world.bound > 0.5


def test_a_linear_map_of_the_total_rank_is_exact_where_domains_are_separable():
    world = World.draw("separable", 0)
    x, y, _ = world.sample(2000, 0)
    whole = torch.einsum("kor,krd->od", world.maps, world.subspaces)
    assert torch.linalg.matrix_rank(whole) == K * r
    assert_close(x @ whole.T, y, rtol=1e-4, atol=1e-4)
    assert world.bound == 0


def test_the_cue_tells_the_domain_and_nothing_else_does():
    x, _, domains = World.draw("conflict", 0).sample(SAMPLES, 0)
    assert torch.equal(x[:, D - K :].argmax(1), domains)
    assert set(x[:, D - K :].unique().tolist()) == {0.0, CUE}
    content = torch.stack([x[domains == z, : D - K].mean(0) for z in range(K)])
    assert content.abs().max() < 0.05


def test_routing_by_domain_gets_below_what_no_static_adapter_can():
    world = World.draw("conflict", 0)
    found = {}
    for arm in ("oracle_routing", "lora_kr"):
        found[arm] = two_worlds.train(arm, world, 3e-2, 120).test
    assert found["oracle_routing"] < 0.6 * world.bound
    assert found["lora_kr"] > 0.95 * world.bound


def test_every_arm_trains_and_a_run_writes_a_row_for_each(tmp_path, capsys):
    csv = tmp_path / "worlds.csv"
    arguments = ["--steps", "2", "--seeds", "2", "--rates", "0.01", "--csv", str(csv)]
    assert two_worlds.main(arguments) == 0
    rows = csv.read_text().splitlines()
    assert len(rows) == 1 + 2 * len(two_worlds.ARMS)
    assert "conflict" in capsys.readouterr().out


def test_arms_of_equal_parameters_have_them():
    def parameters(arm: str) -> int:
        return sum(p.numel() for p in two_worlds.make(arm).parameters() if p.requires_grad)

    assert parameters("lora_params") == parameters("mixture_k2")
    assert parameters("lora_kr") == parameters("mixture_k2") - K * D
