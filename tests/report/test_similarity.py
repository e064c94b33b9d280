"""Cosines of weight changes against the weight changes themselves."""

import pytest
import torch
from torch.testing import assert_close

from moeadapt.report.similarity import cosines, products
from tests.samples import make_bank

MATRICES = ["lora", "shared_a", "shared_b", {"name": "heterogeneous", "ranks": [1, 3, 2, 5]}]
MATRICES += [{"name": "lora", "orthogonalize": True}]


def names(spec):
    return spec if isinstance(spec, str) else spec["name"]


def slow_products(bank):
    deltas = [bank.delta_weight(e) for e in range(bank.size.num_experts)]
    return torch.stack([torch.stack([(p * q).sum() for q in deltas]) for p in deltas])


@pytest.mark.parametrize("num_shared", [0, 2])
@pytest.mark.parametrize("spec", MATRICES, ids=names)
def test_inner_products_are_those_of_the_matrices(spec, num_shared):
    torch.manual_seed(0)
    bank = sized_bank(spec, num_shared)
    assert_close(products(bank), slow_products(bank).detach())


def sized_bank(spec, num_shared=0, **sizes):
    """Build a bank as an adapter does, `rank1` and `heterogeneous` with sizes of their own."""
    from moeadapt.experts import EXPERTS, BankSize

    own = {"in_features": 8, "out_features": 5, "num_experts": 4, "rank": 3, "scale": 1.7, **sizes}
    config = EXPERTS.parse(spec)
    size = config.sized(BankSize(num_shared=num_shared, **own))
    bank = config.build(size, init="random")
    for name in bank.factor_names:
        bank.factor(name).double()
    return bank


def test_every_rank_of_rank1_is_an_expert():
    torch.manual_seed(0)
    bank = sized_bank("rank1")
    assert products(bank).shape == (12, 12)
    assert_close(products(bank), slow_products(bank).detach())


@pytest.mark.parametrize("spec", MATRICES, ids=names)
def test_several_linears_are_one_long_vector_per_expert(spec):
    torch.manual_seed(1)
    banks = [sized_bank(spec), sized_bank(spec, 1, in_features=5, out_features=13, scale=0.3)]
    whole = torch.stack(
        [torch.cat([b.delta_weight(e).detach().flatten() for b in banks]) for e in range(4)]
    )
    expected = torch.nn.functional.cosine_similarity(whole[:, None], whole[None], dim=-1)
    found = cosines(banks)
    assert found is not None
    assert_close(found, expected)
    assert torch.equal(found, found.T)
    assert_close(found.diagonal(), torch.ones(4).double())


def test_equal_and_opposite_experts_are_found():
    bank = make_bank("lora", num_experts=3)
    with torch.no_grad():
        a, b = bank.factor("lora_A").weight, bank.factor("lora_B").weight
        a[3:6], a[6:9] = a[:3], a[:3]
        b[:, 3:6], b[:, 6:9] = 2 * b[:, :3], -b[:, :3]
    found = cosines([bank])
    assert found is not None
    expected = torch.tensor([[1.0, 1.0, -1.0], [1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]])
    assert_close(found, expected.double())


def test_an_expert_that_changes_nothing_is_zero_beside_the_others():
    bank = make_bank("lora")
    with torch.no_grad():
        bank.factor("lora_B").weight[:, 3:6] = 0
    found = cosines([bank])
    assert found is not None
    assert (found[1] == 0).all()
    assert (found[:, 1] == 0).all()
    assert_close(found.diagonal()[[0, 2, 3]], torch.ones(3).double())


@pytest.mark.parametrize("spec", ["ia3", "random_a", {"name": "glu", "dim": 6}], ids=names)
def test_experts_without_a_matrix_of_their_own_have_none(spec):
    assert cosines([make_bank(spec)]) is None
    assert cosines([make_bank("lora"), make_bank(spec)]) is None


def test_an_untrained_mixture_has_no_similarity():
    assert cosines([make_bank("lora", init="zero_b")]) is None
    assert cosines([]) is None
