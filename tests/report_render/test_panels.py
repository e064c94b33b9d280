"""What the panels make of the numbers: names, groups, flows, limits."""

import dataclasses
import math
import random
import re

import pytest

from moeadapt.report.adjust import adjusted
from moeadapt.report.data import ColoredText, TrainingPoint
from moeadapt.report.page import _texts
from moeadapt.report.palette import MOST_DOMAINS, ShownExperts, short_names, shown_experts, spread
from moeadapt.report.panels import texts
from moeadapt.report.panels.domains import domains_panel
from moeadapt.report.panels.experts import experts_panel
from moeadapt.report.panels.flow import THINNEST, _ribbons, _shares, flow_panel
from moeadapt.report.panels.load import load_panel
from moeadapt.report.panels.training import MOST_POINTS, training_panel
from moeadapt.report.panels.worth import worth_panel
from moeadapt.report.wording import number, short_number
from tests.report_render.sample import sample


def test_the_most_loaded_experts_are_shown():
    data = sample(experts=12, layers=3)
    total = [sum(layer.load[e] for layer in data.layers) for e in range(12)]
    hidden = set(range(12)) - set(shown_experts(data).indices)
    assert len(hidden) == 4
    assert max(total[e] for e in hidden) <= min(total[e] for e in shown_experts(data).indices)


def test_folding_keeps_the_sum_and_agrees_with_a_loop():
    experts = ShownExperts((1, 3), 5)
    matrix = [[float(10 * i + j) for j in range(5)] for i in range(5)]
    slow = [[0.0] * 3 for _ in range(3)]
    for i in range(5):
        for j in range(5):
            slow[experts.position(i)][experts.position(j)] += matrix[i][j]
    assert experts.fold_both(matrix) == slow
    assert experts.labels == ["1", "3", "other"]


@pytest.mark.parametrize(("count", "most"), [(1, 6), (6, 6), (7, 6), (48, 6), (210, 48)])
def test_a_spread_has_both_ends_and_no_index_twice(count, most):
    chosen = spread(count, most)
    assert len(chosen) == len(set(chosen)) == min(count, most)
    assert (chosen[0], chosen[-1]) == (0, count - 1)


def test_short_names_tell_layers_apart():
    paths = ["m.layers.0.q.x", "m.layers.0.v.x", "m.layers.11.q.x"]
    assert short_names(paths) == ["0.q", "0.v", "11.q"]
    assert short_names(["a.b.c.d"]) == ["b.c.d"]
    assert short_names(["a", "a.b"]) == ["a", "a.b"]
    assert len(set(short_names(["same", "same"]))) == 2


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.009, "0.009"), (6.4, "6.4"), (0.0, "0"), (-0.5, "\N{MINUS SIGN}0.5"), (1234.5, "1,234"),
     (100.0, "100"), (math.nan, "\N{EN DASH}"), (math.inf, "\N{EN DASH}")],
)  # fmt: skip
def test_short_numbers(value, text):
    assert short_number(value) == text


def test_a_number_that_rounds_to_zero_has_no_sign():
    assert number(-0.0001, 2) == number(0.0001, 2, sign=True) == "0.00"


@pytest.mark.parametrize(
    ("low", "high", "reading"),
    [(0.01, 0.2, "worse than learned"), (-0.2, -0.01, "better than learned"),
     (-0.1, 0.1, "no clear difference"), (1e-7, 2e-6, "no clear difference"),
     (-2e-6, -1e-7, "no clear difference")],
)  # fmt: skip
def test_a_difference_is_read_from_its_interval(low, high, reading):
    data = sample()
    arm = dataclasses.replace(data.arms[1], difference_low=low, difference_high=high)
    panel = worth_panel(dataclasses.replace(data, arms=[data.arms[0], arm]))
    assert [row["reading"] for row in panel.values["arms"]] == ["the reference", reading]


def test_an_unused_expert_and_numbers_that_are_none_can_be_drawn():
    data = sample(layers=2)
    nan = math.nan
    layer = dataclasses.replace(
        data.layers[0],
        load=[0.0, 1.0, *[0.0] * 6],
        lift=[[nan, *row[1:]] for row in data.layers[0].lift],
        p_value=[[nan, *row[1:]] for row in data.layers[0].p_value],
        similarity=[[nan] * 8] * 8,
        mutual_information=nan,
    )
    data = dataclasses.replace(data, layers=[layer, data.layers[1]])
    for make in (load_panel, domains_panel, experts_panel):
        for picture in make(data).pictures:
            assert "NaN" not in picture.svg
            assert "nan" not in picture.alt


def test_line_separators_in_a_domains_name_do_not_stop_the_charts():
    data = sample(layers=1, domains=["a\u2028b", "c\u2029d"])
    for picture in domains_panel(data).pictures:
        assert not {"\u2028", "\u2029"} & set(picture.svg)


def test_many_domains_are_cut_to_those_with_the_most_texts():
    domains = [f"domain {i}" for i in range(60)]
    data = dataclasses.replace(
        sample(layers=1, domains=domains), texts_per_domain=[2] * 30 + [9] * 5 + [2] * 25
    )
    panel = domains_panel(data)
    assert any(f"the {MOST_DOMAINS} of 60 domains" in note for note in panel.notes)
    assert f"Lift of {MOST_DOMAINS} domains" in panel.pictures[0].alt
    assert all(f"domain {i}<" in panel.pictures[0].svg for i in [0, *range(30, 35)])
    assert "domain 40<" not in panel.pictures[0].svg
    assert "of 36 more" in _texts(data)


def test_hollow_marks_are_those_that_could_be_chance():
    data = sample(layers=1)
    layer = dataclasses.replace(data.layers[0], p_value=[[0.5] * 8, [0.016] * 8, [0.5] * 8])
    (lift, _) = domains_panel(dataclasses.replace(data, layers=[layer])).pictures
    assert "8 of 24 are unlikely by chance" in lift.alt


def test_many_tests_of_nothing_fill_few_marks():
    """Uncorrected, 5 % of the marks would be filled, 7 of 144."""
    data, rng = sample(layers=8), random.Random(0)
    layers = [
        dataclasses.replace(layer, p_value=[[rng.random() for _ in row] for row in layer.p_value])
        for layer in data.layers
    ]
    panel = domains_panel(dataclasses.replace(data, layers=layers))
    filled = re.search(r"; (\d+) of 144 are unlikely by chance", panel.pictures[0].alt)
    assert int(filled[1]) <= 2
    assert "Benjamini and Hochberg" in panel.lead


def test_adjusted_p_values_are_those_of_the_definition():
    rng = random.Random(1)
    given = [rng.random() ** 3 for _ in range(20)]
    ranked = sorted(given)
    slow = [min(1.0, *(20 * q / rank for rank, q in enumerate(ranked, 1) if q >= p)) for p in given]
    assert adjusted(given) == pytest.approx(slow)
    assert math.isnan(adjusted([math.nan, 0.04])[0])
    assert adjusted([math.nan, 0.04])[1] == 0.04


def test_ribbons_fill_the_bars_they_join():
    data = sample(layers=2)
    experts = shown_experts(data)
    shares = _shares(data.flows[0], experts)
    assert sum(map(sum, shares)) == pytest.approx(1.0)
    drawn = sum(share >= THINNEST for row in shares for share in row)
    assert len(_ribbons(0.0, 100.0, shares, experts)) == drawn


def test_a_flow_of_many_experts_leaves_the_rest_to_itself_out():
    data = sample(layers=12, experts=16)
    experts = shown_experts(data)
    assert _shares(data.flows[0], experts)[-1][-1] == 0.0
    assert any("left out" in note for note in flow_panel(data).notes)
    assert "5 of 11 pairs" in flow_panel(data).notes[0]


def test_long_texts_are_cut_and_the_page_says_where(monkeypatch):
    data = sample(layers=3)
    monkeypatch.setattr(texts, "MOST_ENTRIES", 3 * 3 * 2 * 20)
    panel = texts.texts_panel(data)
    assert [len(text["tokens"]) for text in panel.values["texts"]] == [20, 20, 20]
    assert [len(layer) for text in panel.values["payload"]["texts"] for layer in text] == [20] * 9
    assert "Each text is shown up to its token 20." in panel.notes


def test_the_payload_has_experts_and_percent_without_those_unused():
    data = sample(layers=1, experts=8)
    text = dataclasses.replace(
        data.texts[0],
        tokens=["a", "b"],
        experts=[[[3, 1], [2, 0]]],
        weights=[[[0.75, 0.25], [0.0, 0.0]]],
    )
    panel = texts.texts_panel(dataclasses.replace(data, texts=[text]))
    assert panel.values["payload"]["texts"] == [[[[3, 75, 1, 25], []]]]
    colors = [token["color"] for token in panel.values["texts"][0]["tokens"]]
    assert colors == ["c3 w8", "none"]


def test_a_long_log_is_thinned_and_one_without_a_metric_says_so():
    points = [TrainingPoint(step=i, values={"moe/entropy": 0.5}) for i in range(2 * MOST_POINTS)]
    panel = training_panel(dataclasses.replace(sample(), training=points))
    assert panel.notes == [
        "Not in the training log: load, max / mean; aux loss.",
        f"Drawn are {MOST_POINTS} of {2 * MOST_POINTS} logged steps.",
    ]
    assert panel.pictures[0].alt.startswith(f"Over {MOST_POINTS} logged steps: entropy")


def test_the_reference_arms_and_flows_keep_their_order():
    data = sample()
    assert [row["name"] for row in worth_panel(data).values["arms"]] == [a.name for a in data.arms]
    assert "learned: 1.482 nats per token" in worth_panel(data).pictures[0].alt


def test_one_layer_that_depends_on_domains_stands_out_of_many():
    """No p is below what the permutations give, however many layers there are."""
    data, floor = sample(layers=30), 2 / 1001
    layers = [
        dataclasses.replace(layer, p_value=[[floor if i == 0 else 0.5] * 8 for _ in range(3)])
        for i, layer in enumerate(data.layers)
    ]
    (lift, _) = domains_panel(dataclasses.replace(data, layers=layers)).pictures
    assert "; 24 of 144 are unlikely by chance" in lift.alt


def test_lifts_that_permutations_cannot_tell_from_chance_are_said_to_be():
    def notes(permutations: int, least: float) -> list[str]:
        p_value = [[least if (row, e) == (0, 0) else 0.5 for e in range(8)] for row in range(3)]
        data = sample()
        layers = [dataclasses.replace(layer, p_value=p_value) for layer in data.layers]
        panel = domains_panel(dataclasses.replace(data, layers=layers, permutations=permutations))
        return [note for note in panel.notes if note.startswith("Lift: so many")]

    # 24 tests in a layer: adjusted, one p of 2 / 501 is 0.096.
    assert notes(500, 2 / 501) == [
        "Lift: so many domains and experts were tested at once in a layer that with 500 "
        "permutations none of them alone can be told from chance."
    ]
    # A p that the permutations could have made smaller is chance, not their fault.
    assert not notes(1000, 2 / 1001)
    assert not notes(1000, 0.02)


def test_experts_that_were_not_tried_alone_are_counted():
    data = sample()
    assert not worth_panel(data).notes
    many = [dataclasses.replace(layer, load=[0.01] * 100) for layer in data.layers]
    assert list(worth_panel(dataclasses.replace(data, layers=many, num_experts=100)).notes) == [
        "Of 100 experts the first 64 were tried alone."
    ]
    few = [dataclasses.replace(data.layers[0], load=[0.2] * 5), *data.layers[1:]]
    assert list(worth_panel(dataclasses.replace(data, layers=few)).notes) == [
        "Of 8 experts the first 5 were tried alone."
    ]


def test_a_layer_that_permutations_cannot_tell_from_chance_is_said_to_be():
    def notes(permutations: int, least: float) -> list[str]:
        data = sample(layers=30)
        layers = [
            dataclasses.replace(layer, mutual_information_p=least if i == 0 else 0.5)
            for i, layer in enumerate(data.layers)
        ]
        panel = domains_panel(dataclasses.replace(data, layers=layers, permutations=permutations))
        return [note for note in panel.notes if note.startswith("Mutual information: 30 layers")]

    assert len(notes(99, 0.01)) == 1
    assert not notes(1000, 0.01)
    assert not notes(1000, 1 / 1001)


def test_a_tip_says_that_it_may_leave_experts_out():
    def notes(slots: int, experts: int) -> list[str]:
        text = ColoredText(
            domain="a",
            tokens=["x"],
            experts=[[list(range(slots))]],
            weights=[[[1 / slots] * slots]],
        )
        return list(
            texts.texts_panel(
                dataclasses.replace(sample(experts=experts, layers=1), texts=[text])
            ).notes
        )

    assert any("at most 8 experts" in note for note in notes(8, 12))
    assert not any("at most 8" in note for note in [*notes(8, 8), *notes(2, 12)])
