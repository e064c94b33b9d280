"""The third that runs by default: what is left out, and what must not be."""

import pytest

from moeadapt.tuner.combinations import combinations
from tests import conftest
from tests.tiny import CASES

WORKING = [one for one in combinations() if one.refusal is None]


@pytest.fixture(scope="module")
def kept():
    return [one for one in WORKING if conftest._latin(one) % conftest.SHARE == 0]


@pytest.mark.parametrize(
    ("a", "b"), [("router", "experts"), ("router", "placement"), ("experts", "placement")]
)
def test_nearly_every_pair_of_a_combination_runs(kept, a, b):
    def pairs(found):
        return {(getattr(one, a), getattr(one, b)) for one in found}

    assert len(kept) < 0.4 * len(WORKING)
    several = {
        pair
        for pair in pairs(WORKING)
        if sum((getattr(one, a), getattr(one, b)) == pair for one in WORKING) >= conftest.SHARE
    }
    assert len(several - pairs(kept)) <= 0.05 * len(several)


def test_every_model_and_kind_is_met_by_some_tests_and_none_by_all():
    names = [f"tests/peft/test_matrix.py::test_{i}" for i in range(60)]

    class Item:
        def __init__(self, nodeid):
            self.nodeid = nodeid

        def get_closest_marker(self, name):
            return None

    for name, kind in CASES:
        places = [conftest._place(Item(one), {"name": name, "kind": kind}) for one in names]
        share = sum(place % conftest.SHARE == 0 for place in places) / len(places)
        assert 0.1 < share < 0.6


def test_what_is_in_no_product_always_runs(request):
    assert conftest._place(request.node, {}) is None
    assert conftest._runs(request.node)
