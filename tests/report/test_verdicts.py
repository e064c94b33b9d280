"""Every answer on both sides of its threshold."""

import itertools

import pytest

from moeadapt.report.data import Arm, Layer
from moeadapt.report.verdicts import balanced, smallest_p, specialised, used, verdicts, worth_it


def layer(load=(0.25,) * 4, active=1.0, bits=0.0, null=0.0, p=1.0, high=None, importance=()):
    rest = {
        "importance": list(importance),
        "cv": 0.0,
        "effective_experts": 0.0,
        "entropy": 0.0,
        "lift": [],
    }
    more = {"p_value": [], "similarity": None, "coactivation": []}
    return Layer(
        name="layer",
        load=[float(share) for share in load],
        max_over_mean=float(max(load) * len(load)),
        active=active,
        mutual_information=bits,
        mutual_information_null=null,
        mutual_information_high=null if high is None else high,
        mutual_information_p=p,
        **rest,
        **more,
    )


def peak(share, num_experts):
    """Return a load with one busy expert."""
    return (share, *((1 - share) / (num_experts - 1),) * (num_experts - 1))


@pytest.mark.parametrize(
    ("share", "num_experts", "active", "answer"),
    [
        (1 / 4, 4, 1, "yes"),
        (0.5, 4, 1, "yes"),
        (0.7, 4, 1, "unclear"),
        (0.82, 4, 1, "no"),
        (1, 4, 1, "no"),
        (2 / 16, 16, 1, "yes"),
        (3 / 16, 16, 1, "unclear"),
        (4.1 / 16, 16, 1, "no"),
        (0.7, 2, 1, "yes"),
        (0.9, 2, 1, "no"),
        # All tokens use the same two of four: no load can be larger than a half.
        (0.5, 4, 2, "no"),
        (0.3, 4, 2, "yes"),
        # Nothing can be uneven.
        (1, 1, 1, "yes"),
        (0.25, 4, 4, "yes"),
    ],
)
def test_balance_has_a_limit_on_either_side(share, num_experts, active, answer):
    load = (1.0,) if num_experts == 1 else peak(share, num_experts)
    found = balanced([layer(load=load, active=float(active))])
    assert found.answer == answer
    assert found.value == pytest.approx(max(load) * num_experts)


def test_the_worst_layer_decides_about_balance():
    fine, bad = layer(load=peak(0.13, 16)), layer(load=(0.5, 0.5, 0, 0), active=2.0)
    for order in itertools.permutations([fine, bad, layer()]):
        found = balanced(list(order))
        assert (found.answer, found.value) == ("no", 2.0)


@pytest.mark.parametrize(
    ("importance", "balance", "use"),
    [
        ((0.25,) * 4, "yes", "yes"),
        ((0.97, 0.01, 0.01, 0.01), "no", "no"),
        # With null experts the probabilities of the rest sum to less than one.
        ((0.1,) * 4, "yes", "yes"),
    ],
)
def test_a_soft_router_is_judged_by_its_probabilities(importance, balance, use):
    """Every expert is in every token's slots, so the load says nothing."""
    soft = [layer(active=4.0, importance=importance)]
    assert (balanced(soft).answer, used(soft).answer) == (balance, use)
    assert "of the probability" in balanced(soft).reason


DEPENDS = {"bits": 0.2, "null": 0.1, "p": 0.01}


@pytest.mark.parametrize(
    ("layers", "answer"),
    [
        ([DEPENDS] * 2 + [{}], "yes"),
        ([DEPENDS, {}], "unclear"),
        ([{}, {}], "no"),
        ([{**DEPENDS, "null": 0.16}], "no"),
        # Not shown, and not shown to be absent either: chance alone spreads too far.
        ([{**DEPENDS, "p": 0.06}], "unclear"),
        ([{"bits": 0.1, "null": 0.1, "high": 0.14}], "no"),
        ([{"bits": 0.1, "null": 0.1, "high": 0.16}], "unclear"),
        ([{}, {"bits": 0.1, "null": 0.1, "high": 0.16}], "unclear"),
    ],
)
def test_specialisation_needs_most_layers(layers, answer):
    assert specialised([layer(**one) for one in layers], [10, 10], 999).answer == answer


def test_too_few_texts_or_permutations_are_unclear():
    dependent = [layer(**DEPENDS)]
    assert specialised(dependent, [2, 2], 999).answer == "unclear"
    assert specialised(dependent, [3, 4], 999).answer == "yes"
    assert specialised(dependent, [10, 10], 18).answer == "unclear"
    assert specialised(dependent, [10, 10], 19).answer == "yes"
    assert specialised([layer()], [20], 999).answer == "unclear"


@pytest.mark.parametrize("sizes", [[1, 1], [2, 2], [3, 3], [2, 3], [2, 2, 2], [1, 2, 3]])
def test_the_smallest_p_is_counted_right(sizes):
    labels = [d for d, size in enumerate(sizes) for _ in range(size)]
    deals = set(itertools.permutations(labels))

    def groups(deal):
        return frozenset(frozenset(i for i, d in enumerate(deal) if d == e) for e in set(deal))

    alike = sum(groups(deal) == groups(labels) for deal in deals)
    assert smallest_p(sizes) == pytest.approx(alike / len(deals))


def test_many_texts_do_not_overflow():
    assert smallest_p([5000, 5000, 1]) == 0.0


@pytest.mark.parametrize(("idle", "answer"), [(0, "yes"), (1, "yes"), (2, "unclear"), (6, "no")])
def test_used_counts_the_experts_of_all_layers(idle, answer):
    busy = [layer(load=(1 / 20,) * 20)]
    load = [0.0] * idle + [1 / (20 - idle)] * (20 - idle)
    found = used([layer(load=load)])
    assert found.answer == answer
    assert found.value == pytest.approx(1 - idle / 20)
    assert used([*busy, layer(load=load)]).value == pytest.approx(1 - idle / 40)


def test_an_expert_below_a_quarter_of_an_even_share_is_not_used():
    assert used([layer(load=(0.06, 0.94 / 3, 0.94 / 3, 0.94 / 3))]).value == 0.75
    assert used([layer(load=(0.0625, 0.3125, 0.3125, 0.3125))]).value == 1.0


RIVALS = ("uniform", "random", "shuffled", "best single expert")


def arms(**spans):
    """Return arms; a span is (difference, low, high)."""
    found = []
    for name in ("learned", *RIVALS, "adapter off"):
        default = (0.0,) * 3 if name == "learned" else (0.3, 0.2, 0.4)
        span = spans.get(name.split()[0], default)
        parts = dict(zip(("difference", "difference_low", "difference_high"), span, strict=True))
        found.append(Arm(name=name, nll=2.0, nll_low=1.9, nll_high=2.1, **parts))
    return found


@pytest.mark.parametrize(
    ("spans", "answer", "value"),
    [
        ({}, "yes", 0.3),
        ({"best": (0.1, 0.05, 0.15)}, "yes", 0.1),
        ({"best": (0.1, -0.05, 0.25)}, "unclear", 0.1),
        ({"best": (-0.1, -0.2, -0.05)}, "no", -0.1),
        ({"uniform": (-0.1, -0.2, 0.01)}, "unclear", -0.1),
        # A wide interval shows nothing; one within 0.01 shows that nothing is there.
        ({"shuffled": (0.1, -0.1, 0.3)}, "unclear", 0.1),
        ({"shuffled": (0.001, -0.008, 0.0101)}, "unclear", 0.001),
        ({"shuffled": (0.001, -0.008, 0.0099)}, "no", 0.001),
        ({"shuffled": (0.003, 0.001, 0.005)}, "yes", 0.003),
        ({"shuffled": (1e-12, 1e-13, 1e-11)}, "no", 1e-12),
        ({"adapter": (-0.1, -0.2, -0.05)}, "no", -0.1),
        ({"adapter": (-0.1, -0.2, 0.05)}, "unclear", -0.1),
    ],
)
def test_worth_it_needs_every_rival_to_be_worse(spans, answer, value):
    found = worth_it(arms(**spans), 50)
    assert (found.answer, found.value) == (answer, value)


def test_few_texts_and_routers_that_look_ahead_are_unclear():
    assert worth_it(arms(), 7).answer == "unclear"
    assert worth_it(arms(), 8).answer == "yes"
    assert worth_it(arms(), 50, causal=False).answer == "unclear"


def test_the_tiles_have_their_order_and_plain_sentences():
    found = verdicts([layer()], arms(), [10, 10], 999, 20)
    assert [tile.name for tile in found] == ["balanced", "specialised", "used", "worth it"]
    for tile in found:
        assert tile.reason.endswith(".")
        assert "\n" not in tile.reason
        assert tile.unit


def test_a_layer_that_uses_no_expert_is_not_balanced():
    found = balanced([layer((0.9, 0.1, 0, 0)), layer((0,) * 4, active=0.0)])
    assert found.answer == "no"
    assert found.reason == "No token uses an expert of layer."


def test_balanced_names_the_limit_that_it_used():
    narrow = balanced([layer((0.4, 0.3, 0.2, 0.1), active=2.0)])
    assert narrow.answer == "yes"
    assert narrow.reason.endswith("below 1.75 times is balanced.")
    wide = balanced([layer((0.4, 0.3, 0.2, 0.1), active=1.0)])
    assert wide.reason.endswith("up to 2 times is balanced.")


def test_texts_without_a_loss_do_not_count():
    answers = [verdicts([layer()], arms(), [7, 1], 999, scored)[3].answer for scored in (1, 8)]
    assert answers == ["unclear", "yes"]
