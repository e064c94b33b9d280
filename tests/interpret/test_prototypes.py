"""Prototypes are the tokens with the largest weights, where they stand."""

import pytest
import torch

import moeadapt
from moeadapt.errors import ConfigError
from moeadapt.interpret import prototypes, read_batches
from moeadapt.interpret.observe import observe
from moeadapt.interpret.prototypes import _largest
from tests.interpret.kit import model_of, model_with_idle_expert
from tests.tiny import logits
from tests.toy import sentences, toy_tokenizer

TEXTS = [*sentences(7), "w5 </s> w6"]
TOKENIZER = toy_tokenizer()
LAYER = "model.layers.0.mlp"


@pytest.fixture(scope="module")
def model():
    return model_of("block")


@pytest.fixture(scope="module")
def taken(model):
    """Return (weight, text, position) of every token that each expert takes, text by text."""
    found = [[] for _ in range(4)]
    for number, text in enumerate(TEXTS):
        ids = TOKENIZER(text)["input_ids"]
        with moeadapt.collect_routing(model) as routings:
            logits(model, {"input_ids": torch.tensor([ids])})
        for place, weights in enumerate(routings[LAYER][0].weights.tolist()):
            for expert in range(4):
                if weights[expert] > 0 and ids[place] > 3:
                    found[expert].append((weights[expert], number, place))
    return [sorted(own, key=lambda one: (-one[0], *one[1:])) for own in found]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokens_with_the_largest_weights_come_first(side, model, taken):
    tokenizer = toy_tokenizer()
    tokenizer.padding_side = side
    found = prototypes(model, tokenizer, TEXTS, per_expert=6, batch_size=3, context=2)
    assert LAYER in found
    for expert in range(4):
        best = taken[expert][:6]
        mine = found[LAYER][expert]
        assert [(one.text, one.position) for one in mine] == [x[1:] for x in best]
        assert [one.weight for one in mine] == pytest.approx([x[0] for x in best])
        for one in mine:
            words = TEXTS[one.text].split()
            assert one.token == words[one.position]
            assert one.before == " ".join(words[max(0, one.position - 2) : one.position])
            assert one.after == " ".join(words[one.position + 1 : one.position + 3])
            assert TOKENIZER.decode([one.token_id]) == one.token


def test_special_tokens_are_left_out(model):
    found = prototypes(model, TOKENIZER, TEXTS, per_expert=1000)
    every = [one for own in found.values() for expert in own.values() for one in expert]
    assert {one.token for one in every}.isdisjoint({"</s>", "<pad>"})


def test_an_unused_expert_has_no_token():
    found = prototypes(model_with_idle_expert("ffn"), TOKENIZER, TEXTS, layers=[LAYER])
    assert found[LAYER][3] == ()
    assert len(found[LAYER][0]) == 5


def test_wrong_counts_and_texts_are_refused(model):
    for wrong in ({"per_expert": 0}, {"context": -1}):
        with pytest.raises(ConfigError, match="1 or more"):
            prototypes(model, TOKENIZER, TEXTS, **wrong)
    with pytest.raises(ConfigError, match="data is empty"):
        prototypes(model, TOKENIZER, [])
    with pytest.raises(ConfigError, match="padding token"):
        prototypes(model, None, TEXTS)


def test_batches_give_what_their_texts_give(model):
    batches = read_batches(TEXTS, tokenizer=TOKENIZER, batch_size=3)
    expected = prototypes(model, TOKENIZER, TEXTS, batch_size=3)
    assert prototypes(model, TOKENIZER, batches) == expected
    mappings = [dict(batch.inputs) for batch in batches]
    assert prototypes(model, TOKENIZER, mappings) == expected


@pytest.mark.parametrize("number", [1, 3, 8, 20])
def test_the_largest_are_those_of_a_sort_that_keeps_the_order_of_equals(number):
    generator = torch.Generator().manual_seed(number)
    weights = torch.randint(0, 4, (12,), generator=generator) / 4
    slow = sorted(enumerate(weights.tolist()), key=lambda one: (-one[1], one[0]))[:number]
    assert _largest(weights, number) == [one for one in slow if one[1] > 0]
    assert _largest(weights[:0], number) == []


def test_what_is_kept_of_a_batch_does_not_grow_with_its_experts(model):
    batches = read_batches(TEXTS, tokenizer=TOKENIZER, batch_size=3)
    seen = observe(model, batches, [LAYER])
    assert [tuple(part.shape) for part in seen.kept[LAYER]] == [(size,) for size in seen.sizes]
    assert sum(seen.sizes) == len(seen.token_ids) == len(seen.main_experts()[LAYER])
