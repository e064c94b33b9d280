"""Each expert alone, domain by domain."""

import pytest

from moeadapt.errors import ConfigError
from moeadapt.interpret import probe_experts
from tests.interpret.kit import items, model_of, token_losses


@pytest.fixture(scope="module")
def model():
    return model_of("ffn")


def losses(model, data, domain, **override):
    every = []
    for item in data:
        rows = token_losses(model, item, **override)
        every += [
            x
            for name, row in zip(item["domain"], rows, strict=True)
            for x in row * (name == domain)
        ]
    return sum(every) / len(every)


def test_the_matrix_holds_each_experts_loss_on_each_domain(model):
    data = items(1)
    found = probe_experts(model, data)
    assert found.domains == ("blue", "red")
    assert found.experts == (0, 1, 2, 3)
    for column, domain in enumerate(found.domains):
        assert found.learned[column] == pytest.approx(losses(model, data, domain))
        for expert in range(4):
            alone = losses(model, data, domain, force=expert)
            assert found.alone[expert][column] == pytest.approx(alone)


def test_domains_may_come_as_a_mapping(model):
    data = items(1)[0]
    rows = {"blue": [1], "red": [0, 2]}
    split = {
        name: [{key: data[key][own] for key in ("input_ids", "attention_mask")}]
        for name, own in rows.items()
    }
    found = probe_experts(model, split, experts=[2])
    expected = probe_experts(model, [data], experts=[2])
    assert found.domains == expected.domains
    assert found.learned == pytest.approx(expected.learned)
    assert found.alone[0] == pytest.approx(expected.alone[0])


def test_only_experts_of_every_layer_can_be_alone():
    model = model_of(
        "block",
        experts_pattern={f"model.layers.0.mlp.{name}_proj": 2 for name in ("gate", "up", "down")},
    )
    assert probe_experts(model, items(1)).experts == (0, 1)
    with pytest.raises(ConfigError, match="experts 0 to 1"):
        probe_experts(model, items(1), experts=[3])


def test_domains_without_a_name_or_a_token_are_refused(model):
    (item,) = items(1)
    unnamed = {name: item[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ConfigError, match="have no domains"):
        probe_experts(model, [unnamed])
    with pytest.raises(ConfigError, match="data is empty"):
        probe_experts(model, {})
    short = {"input_ids": item["input_ids"][:, :1]}
    with pytest.raises(ConfigError, match="no token of the domain 'short'"):
        probe_experts(model, {"long": [unnamed], "short": [short]})
