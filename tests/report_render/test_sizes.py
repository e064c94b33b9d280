"""Reports of models whose layers have different numbers of experts, as `experts_pattern` makes."""

import json

import pytest

from moeadapt.report.palette import shown_experts
from moeadapt.report.panels.domains import domains_panel
from moeadapt.report.panels.experts import experts_panel
from moeadapt.report.panels.flow import flow_panel
from moeadapt.report.panels.layers import layers_panel
from moeadapt.report.panels.load import _columns, _names, load_panel
from moeadapt.report.render import render
from moeadapt.report.wording import rounded
from tests.report_render.sample import sample

SIZES = {"rising": [2, 4], "falling": [4, 2, 3], "one alone": [1, 3], "many": [70, 3, 80]}


@pytest.mark.parametrize("sizes", list(SIZES.values()), ids=list(SIZES))
def test_every_panel_is_drawn(sizes):
    data = sample(experts=sizes, tokens=5)
    for make in (load_panel, domains_panel, experts_panel, flow_panel):
        assert make(data).pictures
    # Only expert numbers that a layer has are a row of the table.
    tables = layers_panel(data).values["tables"]
    if sum(sizes) <= 64:
        assert len(tables[1]["rows"]) == sum(sizes)


def test_a_report_of_layers_of_different_sizes_is_written(tmp_path):
    data = sample(experts=[2, 4], tokens=5)
    paths = render(data, tmp_path / "run.html")
    assert json.loads(paths[1].read_text()) == rounded(data.to_json())


@pytest.mark.parametrize("sizes", [[2, 4], [70, 3, 80]])
def test_a_load_is_a_multiple_of_its_own_layers_balance(sizes):
    data = sample(experts=sizes, tokens=5)
    shown = shown_experts(data).indices
    for layer in data.layers:
        size = len(layer.load)
        times = dict(_columns(data, layer.load))
        assert set(times) <= set(_names(data))
        own = [e for e in range(size) if max(sizes) <= 64 or e in shown]
        assert {e: times.pop(str(e)) for e in own} == {e: layer.load[e] * size for e in own}
        rest = [share for e, share in enumerate(layer.load) if e not in own]
        if rest:
            assert times.pop("other") == pytest.approx(sum(rest) * size / len(rest))
        assert not times
    panel = load_panel(data)
    assert "balanced load 1/E." in panel.lead
    assert any("number of experts of the layer" in note for note in panel.notes)


def test_tokens_that_keep_their_expert_are_counted_on_the_shared_numbers():
    data = sample(experts=[2, 4], tokens=5)
    (flow,) = data.flows
    stay = 100 * (flow.shares[0][0] + flow.shares[1][1])
    assert f"average {stay:.1f} % keep" in flow_panel(data).pictures[0].alt
