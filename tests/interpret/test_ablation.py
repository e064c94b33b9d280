"""The rise of the loss is that of the model without the expert."""

import pytest

from moeadapt.errors import ConfigError
from moeadapt.interpret import ablation
from moeadapt.interpret.scope import choose_layers
from tests.interpret.kit import KINDS, items, mean_loss, model_of, model_with_idle_expert, zeroed


@pytest.mark.parametrize("kind", KINDS)
def test_rises_are_differences_of_mean_losses(kind):
    model, data = model_of(kind), items(1)
    layers = list(choose_layers(model))[-2:]
    found = ablation(model, data, experts=[1], layers=layers)
    own = mean_loss(model, data)
    assert found.loss == pytest.approx(own)
    assert list(found.by_layer["zero"]) == layers
    for layer in layers:
        zero = mean_loss(model, data, edit=zeroed([1], [layer])) - own
        ban = mean_loss(model, data, ban=1, layers=[layer]) - own
        assert found.by_layer["zero"][layer] == {1: pytest.approx(zero)}
        assert found.by_layer["ban"][layer] == {1: pytest.approx(ban)}
    zero = mean_loss(model, data, edit=zeroed([1], layers)) - own
    ban = mean_loss(model, data, ban=1, layers=layers) - own
    assert found.everywhere["zero"] == {1: pytest.approx(zero)}
    assert found.everywhere["ban"] == {1: pytest.approx(ban)}
    assert abs(found.everywhere["zero"][1]) > 1e-6
    assert found.everywhere["zero"][1] != pytest.approx(found.everywhere["ban"][1])


@pytest.mark.parametrize("kind", KINDS)
def test_removing_an_unused_expert_changes_nothing(kind):
    model = model_with_idle_expert(kind)
    layers = list(choose_layers(model))[-2:]
    found = ablation(model, items(1), experts=[0, 3], layers=layers)
    assert found.everywhere["zero"][3] == 0
    assert all(rises[3] == 0 for rises in found.by_layer["zero"].values())
    assert found.everywhere["ban"][3] == pytest.approx(0, abs=1e-12)
    assert found.everywhere["zero"][0] != 0


def test_a_lone_expert_cannot_be_replaced():
    model = model_of("block", num_experts=1, router={"name": "top_k", "k": 1})
    found = ablation(model, items(1))
    assert found.everywhere["ban"] == {}
    assert all(rises == {} for rises in found.by_layer["ban"].values())
    assert found.everywhere["zero"][0] != 0


def test_an_unknown_removal_is_refused():
    with pytest.raises(ConfigError, match="must be some of"):
        ablation(model_of("ffn"), items(), removals=["forget"])
