"""Mutual information of tags and experts, against its definition and against chance."""

import math
from collections import Counter

import pytest
import torch

import moeadapt
from moeadapt.errors import ConfigError
from moeadapt.interpret import context_independence, tag_information
from moeadapt.interpret.information import compare_with_chance, mutual_information, shuffled
from moeadapt.interpret.observe import main_expert
from tests.interpret.kit import items, model_of
from tests.tiny import logits

LAYER = "model.layers.1.mlp"


@pytest.fixture(scope="module")
def model():
    return model_of("block")


def slow(a, b):
    """Return sum p(a, b) log2 p(a, b) / (p(a) p(b))."""
    n, both, left, right = len(a), Counter(zip(a, b, strict=True)), Counter(a), Counter(b)
    return sum(c / n * math.log2(c * n / (left[x] * right[y])) for (x, y), c in both.items())


def main_experts(model, item, layer=LAYER):
    """Return each token's main expert [rows, tokens]."""
    inputs = {name: item[name] for name in ("input_ids", "attention_mask")}
    with moeadapt.collect_routing(model) as routings:
        logits(model, inputs)
    return routings[layer][0].weights.argmax(-1).view_as(inputs["input_ids"])


def real_values(data, arrays):
    """Flatten arrays, padding left out."""
    return [
        value
        for item, rows in zip(data, arrays, strict=True)
        for row, mask in zip(rows, item["attention_mask"].tolist(), strict=True)
        for value, keep in zip(row, mask, strict=True)
        if keep
    ]


def test_mutual_information_is_its_definition():
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(0, 7, (200,), generator=generator)
    b = (a + torch.randint(0, 3, (200,), generator=generator)) % 5
    assert mutual_information(a, b) == pytest.approx(slow(a.tolist(), b.tolist()))
    assert mutual_information(a, a) == pytest.approx(slow(a.tolist(), a.tolist()))


@pytest.mark.parametrize("tag", ["token_id", "position", "domain"])
def test_known_tags_are_read_from_the_data(tag, model):
    data = items()
    if tag == "token_id":
        arrays = [item["input_ids"].tolist() for item in data]
    elif tag == "position":
        arrays = [(item["attention_mask"].cumsum(1) - 1).tolist() for item in data]
    else:
        arrays = [[[name] * 9 for name in item["domain"]] for item in data]
    found = tag_information(model, data, tag, permutations=9)
    experts = real_values(data, [main_experts(model, item).tolist() for item in data])
    own = found.layers[LAYER]
    assert own.bits == pytest.approx(slow(real_values(data, arrays), experts))
    assert own.tokens == len(experts)
    assert found.permuted == ("texts" if tag == "domain" else "tokens")
    given = tag_information(model, data, arrays, permutations=9).layers[LAYER]
    assert given.bits == pytest.approx(own.bits)
    assert given.null_bits == pytest.approx(own.null_bits)


def test_the_main_expert_as_a_tag_says_all(model):
    data = items(4)
    tags = [main_experts(model, item) for item in data]
    own = tag_information(model, data, tags, layers=[LAYER], permutations=19).layers[LAYER]
    assert own.bits == pytest.approx(own.expert_entropy)
    assert own.null_bits < own.bits / 2
    assert own.p_value == 1 / 20


def test_a_constant_tag_says_nothing(model):
    data = items()
    tags = [[["x"] * 9] * 3 for _ in data]
    own = tag_information(model, data, tags, permutations=9).layers[LAYER]
    assert own.bits == 0
    assert own.p_value == 1


def test_what_padding_is_tagged_does_not_matter(model):
    data = items(1)
    tags = main_experts(model, data[0])
    other = tags.masked_fill(data[0]["attention_mask"] == 0, 99)
    found = [tag_information(model, data, [x], permutations=5) for x in (tags, other)]
    assert found[0] == found[1]


def test_meaningless_tags_are_rarely_significant():
    generator = torch.Generator().manual_seed(0)
    experts = torch.randint(0, 4, (80,), generator=generator)
    small = 0
    for seed in range(30):
        tags = torch.randint(0, 3, (80,), generator=generator)
        own = compare_with_chance(tags, {"": experts}, shuffled(tags), 19, seed)[""]
        small += own.p_value <= 0.1
    # Binomial(30, 0.1): 9 or more have a chance of 0.002.
    assert small < 9


def test_permuted_domains_stay_whole():
    """Each text has one expert of its own: its tokens say one thing, not nine."""
    model = model_of("block", router={"name": "hash", "k": 1})
    rows = [[word] * 9 for word in (5, 6, 7, 8)]
    data = [{"input_ids": torch.tensor(rows), "domain": ["a", "a", "b", "b"]}]
    own = tag_information(model, data, "domain", permutations=100)
    tokens = [[[name] * 8 + [name + "."] for name in "aabb"]]
    every = tag_information(model, data, tokens, permutations=100)
    assert own.permuted == "texts"
    assert every.permuted == "tokens"
    # Of the 6 ways to give two of four texts a domain, 2 tell as much as the truth, or all do.
    assert own.layers[LAYER].p_value > 0.2
    assert every.layers[LAYER].p_value < 0.05


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ("colour", "unknown tag 'colour'"),
        ("domains", "did you mean 'domain'"),
        ([], "0 arrays for 1 batches"),
        ([[[1, 2, 3]]], r"tags\[0\] has not the shape \(3, 9\)"),
        ("domain", "have no domains"),
    ],
)
def test_wrong_tags_are_refused(tags, message, model):
    (item,) = items(1)
    del item["domain"]
    with pytest.raises(ConfigError, match=message):
        tag_information(model, [item], tags)


def test_no_permutation_is_refused(model):
    with pytest.raises(ConfigError, match="permutations=0"):
        tag_information(model, items(1), permutations=0)


def few_words(count=6):
    """Return texts of six words, so that each is seen often."""
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(5, 11, (3, 9), generator=generator)} for _ in range(count)]


def test_a_router_that_looks_at_the_id_alone_is_explained_by_it():
    found = context_independence(model_of("block", router={"name": "hash", "k": 1}), few_words())
    for own in found.layers.values():
        assert own.share == pytest.approx(1)
        assert own.adjusted == pytest.approx(1)
        assert own.information.p_value < 0.01
    assert found.coverage == 1


def test_a_router_with_one_main_expert_needs_no_explanation():
    found = context_independence(model_of("block", router="uniform"), few_words())
    assert all(own.share is None and own.adjusted is None for own in found.layers.values())


def test_the_share_is_information_over_entropy_above_chance(model):
    data = [{**item, "attention_mask": torch.ones(3, 9).long()} for item in few_words()]
    found = context_independence(model, data, permutations=30)
    ids = real_values(data, [item["input_ids"].tolist() for item in data])
    experts = real_values(data, [main_experts(model, item).tolist() for item in data])
    own = found.layers[LAYER]
    assert own.share == pytest.approx(slow(ids, experts) / slow(experts, experts))
    null = own.information.null_bits
    whole = slow(experts, experts)
    assert own.adjusted == pytest.approx((slow(ids, experts) - null) / (whole - null))
    assert own.adjusted < own.share


def test_rare_ids_do_not_count(model):
    data = [*few_words(), {"input_ids": torch.tensor([[50, 51, 52, 53]])}]
    found = context_independence(model, data, permutations=3)
    assert found.coverage == pytest.approx(6 * 27 / (6 * 27 + 4))
    assert found.layers[LAYER].information.tokens == 6 * 27
    with pytest.raises(ConfigError, match="no token id is seen 1000 times"):
        context_independence(model, data, min_count=1000)
    with pytest.raises(ConfigError, match="min_count=1"):
        context_independence(model, data, min_count=1)


def test_a_token_without_an_expert_has_a_main_expert_of_its_own():
    weights = torch.tensor([[0.0, 0.0], [0.2, 0.5], [0.0, 0.0], [1.0, 0.0]])
    assert main_expert(weights).tolist() == [2, 1, 2, 0]
