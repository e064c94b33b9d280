"""Lift, permutation p values and mutual information against loops over permutations."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from moeadapt.report import domains
from moeadapt.report.adjust import LEVEL, adjusted
from moeadapt.report.counts import LayerCounts
from moeadapt.report.domains import (
    MOST_LABELS,
    MOST_PERMUTATIONS,
    compare_domains,
    enough_permutations,
    information,
    lifts,
    permuted_labels,
)

N, D, E, P = 11, 3, 4, 57


def layer_of(used, main=None):
    layer = LayerCounts("layer", used.shape[1], used.shape[0])
    layer.used, layer.main = used.float(), (used if main is None else main).float()
    return layer


def random_case(seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2])
    used = torch.randint(0, 4, (N, E), generator=generator)
    main = torch.randint(0, 4, (N, E), generator=generator)
    return labels, layer_of(used, main)


def table(labels, counts, num_domains):
    """Add up the counts of each domain's texts, one by one."""
    total = [[0] * counts.shape[1] for _ in range(num_domains)]
    for label, row in zip(labels.tolist(), counts.tolist(), strict=True):
        for expert, value in enumerate(row):
            total[label][expert] += int(value)
    return total


def slow_lift(cells, d, e):
    everything = sum(map(sum, cells))
    of_expert = sum(row[e] for row in cells) / everything
    return 1.0 if of_expert == 0 or sum(cells[d]) == 0 else cells[d][e] / sum(cells[d]) / of_expert


def slow_bits(cells):
    everything = sum(map(sum, cells))
    bits = 0.0
    for row, e in itertools.product(cells, range(len(cells[0]))):
        if row[e]:
            apart = sum(row) * sum(r[e] for r in cells) / everything**2
            bits += row[e] / everything * math.log2(row[e] / everything / apart)
    return bits


@pytest.mark.parametrize("entries", [1, 100, 2**24])
@pytest.mark.parametrize("seed", [0, 1])
def test_everything_agrees_with_a_loop_over_permutations(monkeypatch, entries, seed):
    monkeypatch.setattr(domains, "MOST_ENTRIES", entries)
    labels, layer = random_case(seed)
    permuted = permuted_labels(labels, P, seed=3)
    found = compare_domains(labels, permuted, D, layer)
    own = table(labels, layer.used, D)
    dealt = [table(row, layer.used, D) for row in permuted]
    for d, e in itertools.product(range(D), range(E)):
        lift = slow_lift(own, d, e)
        null = [slow_lift(cells, d, e) for cells in dealt]
        assert float(found.lift[d, e]) == pytest.approx(lift)
        above = sum(value >= lift - 1e-12 for value in null) + 1
        below = sum(value <= lift + 1e-12 for value in null) + 1
        p_value = min(1.0, 2 * min(above, below) / (P + 1))
        assert float(found.p_value[d, e]) == pytest.approx(p_value)
    bits = slow_bits(table(labels, layer.main, D))
    null = [slow_bits(table(row, layer.main, D)) for row in permuted]
    assert found.mutual_information == pytest.approx(bits)
    assert found.mutual_information_null == pytest.approx(sum(null) / P)
    above = [bits for bits in null if bits > found.mutual_information_high]
    assert len(above) == pytest.approx(0.05 * P, abs=1)
    reached = sum(value >= bits - 1e-12 for value in null)
    assert found.mutual_information_p == pytest.approx((reached + 1) / (P + 1))


def test_a_permutation_deals_out_the_same_labels():
    labels, _ = random_case()
    permuted = permuted_labels(labels, P, seed=0)
    assert torch.equal(permuted.sort(-1).values, labels.sort().values.expand(P, N))
    assert len(permuted.unique(dim=0)) > P // 2
    assert torch.equal(permuted, permuted_labels(labels, P, seed=0))
    assert not torch.equal(permuted, permuted_labels(labels, P, seed=1))


def test_texts_are_permuted_and_not_tokens():
    """Two long texts of one expert each tell nothing, however many tokens they have."""
    labels = torch.tensor([0, 1])
    layer = layer_of(torch.tensor([[500, 0], [0, 500]]))
    found = compare_domains(labels, permuted_labels(labels, 99, 0), 2, layer)
    assert found.mutual_information == pytest.approx(1.0)
    assert found.mutual_information_p == 1.0
    assert found.p_value.min() > 0.3


def test_disjoint_domains_tell_everything():
    labels = torch.tensor([0] * 8 + [1] * 8)
    used = torch.tensor([[5, 0]] * 8 + [[0, 5]] * 8)
    found = compare_domains(labels, permuted_labels(labels, 999, 0), 2, layer_of(used))
    assert_close(found.lift, torch.tensor([[2.0, 0.0], [0.0, 2.0]]).double())
    assert found.mutual_information == pytest.approx(1.0)
    assert found.mutual_information_p < 0.01
    assert found.p_value.max() < 0.01


def test_p_values_are_uniform_under_chance():
    """Whatever the level, chance reaches it no oftener than that."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 10 + [1] * 10)
    p_values = []
    for seed in range(200):
        layer = layer_of(torch.randint(0, 9, (20, 3), generator=generator))
        found = compare_domains(labels, permuted_labels(labels, 99, seed), 2, layer)
        p_values.append(found.mutual_information_p)
    for level in (0.05, 0.2, 0.5):
        # Four standard deviations of a share of 200.
        slack = 4 * math.sqrt(level * (1 - level) / 200)
        assert abs(sum(p <= level for p in p_values) / 200 - level) < slack


def test_one_domain_has_nothing_to_compare():
    layer = layer_of(torch.tensor([[1, 2], [3, 0]]))
    labels = torch.zeros(2, dtype=torch.int64)
    found = compare_domains(labels, permuted_labels(labels, 5, 0), 1, layer)
    assert_close(found.lift, torch.ones(1, 2).double())
    assert_close(found.p_value, torch.ones(1, 2).double())
    assert (found.mutual_information, found.mutual_information_null) == (0.0, 0.0)
    assert found.mutual_information_p == 1.0


def test_what_was_never_used_has_lift_one():
    labels = torch.tensor([0, 0, 1])
    layer = layer_of(torch.tensor([[2, 0, 1], [1, 0, 0], [0, 0, 0]]))
    found = compare_domains(labels, permuted_labels(labels, 9, 0), 2, layer)
    assert_close(found.lift[:, 1], torch.ones(2).double())
    assert_close(found.lift[1], torch.ones(3).double())
    assert (found.p_value[:, 1] == 1).all()
    assert found.lift.isfinite().all()


def test_tables_without_tokens_give_no_information():
    assert float(information(torch.zeros(1, 2, 3).double())) == 0.0
    assert_close(lifts(torch.zeros(1, 2, 3).double()), torch.ones(1, 2, 3).double())


def test_to_use_no_expert_tells_the_domain_too():
    labels = torch.tensor([0] * 8 + [1] * 8)
    layer = layer_of(torch.tensor([[5, 5]] * 8 + [[0, 0]] * 8))
    layer.idle = torch.tensor([[0.0]] * 8 + [[10.0]] * 8)
    found = compare_domains(labels, permuted_labels(labels, 99, 0), 2, layer)
    assert found.mutual_information == pytest.approx(1.0)
    assert found.mutual_information_p < 0.05


@pytest.mark.parametrize(("domains", "experts"), [(2, 4), (5, 8), (24, 8), (3, 64)])
def test_one_lift_alone_can_stand_out_of_a_layer(domains, experts):
    permutations = enough_permutations(domains, experts, num_texts=100)
    least = 2 / (permutations + 1)
    p_values = [least, *[0.5] * (domains * experts - 1)]
    assert adjusted(p_values)[0] <= LEVEL
    assert permutations >= 1000


def test_permutations_are_bounded():
    assert enough_permutations(24, 64, num_texts=100) == MOST_PERMUTATIONS
    many = enough_permutations(24, 64, num_texts=20_000)
    assert 1000 <= many < MOST_PERMUTATIONS
    assert many * 20_000 <= MOST_LABELS
