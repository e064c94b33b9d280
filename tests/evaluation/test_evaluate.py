"""Losses and greedy answers are those of the slow references; rows are put together as sums."""

import json

import pytest
import torch
from torch import nn

from moeadapt.errors import ConfigError
from moeadapt.evaluation import evaluate, forgetting
from tests.evaluation.kit import TOKENIZER, rows, slow_answer, slow_nll, words
from tests.tiny import adapt, moe_config, tiny


@pytest.fixture(scope="module")
def found(model):
    return evaluate(model, TOKENIZER, rows(), batch_size=5)


def test_the_loss_of_each_row_is_that_of_its_answer_token_by_token(found, model):
    for row, scored in zip(rows()[:6], found.rows, strict=False):
        total, count = slow_nll(model, row)
        assert scored.nll == pytest.approx(total, rel=1e-9)
        assert (scored.tokens, scored.exact) == (count, None)


def test_domains_and_the_whole_are_ratios_of_sums(found):
    groups = {"a": found.rows[::2], "b": found.rows[1::2]}
    assert set(found.by_domain) == set(groups)
    scores = [(found.overall, found.rows), *((found.by_domain[n], g) for n, g in groups.items())]
    for score, group in scores:
        tokens = sum(row.tokens for row in group)
        assert (score.rows, score.tokens) == (len(group), tokens)
        assert score.nll == pytest.approx(sum(row.nll for row in group) / tokens)
        assert score.nll_interval.low < score.nll < score.nll_interval.high
        assert (score.answered, score.exact, score.exact_interval) == (0, None, None)


@pytest.mark.parametrize("batch_size", [1, 12])
def test_the_batch_size_changes_nothing(batch_size, found, model):
    other = evaluate(model, TOKENIZER, rows(), batch_size=batch_size)
    assert [row.nll for row in other.rows] == pytest.approx([row.nll for row in found.rows])


def test_rows_without_domains_have_no_groups_and_one_row_no_interval(model):
    found = evaluate(model, TOKENIZER, [{"text": "w1 w2 w3"}])
    assert found.by_domain == {}
    assert found.overall.nll_interval is None


def test_cut_rows_are_counted(model):
    given = [{"text": "w1 w2 w3 w4"}, {"text": "w1 w2"}]
    found = evaluate(model, TOKENIZER, given, max_length=3)
    assert (found.truncated, found.overall.tokens) == (1, 3)


def test_the_result_is_json(found):
    data = json.loads(json.dumps(found.to_json()))
    assert data["overall"]["nll"] == found.overall.nll
    assert [row["key"] for row in data["rows"]] == [row.key for row in found.rows]
    assert data["by_domain"]["a"]["nll_interval"]["low"] == found.by_domain["a"].nll_interval.low


def test_the_mode_of_the_model_is_left_as_it_was(model):
    model.train()
    try:
        first = evaluate(model, TOKENIZER, rows(), generate=True).overall
        assert all(module.training for module in model.modules())
    finally:
        model.eval()
    assert first == evaluate(model, TOKENIZER, rows(), generate=True).overall


@pytest.fixture(scope="module")
def spoken(model):
    """Prompts, and what the model says after each, in words."""
    pairs = []
    for start in range(100):
        if len(pairs) == 4:
            return pairs
        prompt = f"w{start} " * (1 + start % 4)
        said = slow_answer(model, words(prompt), 5)
        if all(4 <= token < 104 and said.count(token) == 1 for token in said):
            pairs.append((prompt, said))
    raise AssertionError("this model says nothing but special tokens")


def text_of(tokens):
    return " ".join(f"w{token - 4}" for token in tokens)


def test_an_answer_matches_when_greedy_generation_ends_with_it(model, spoken, monkeypatch):
    """The model says `said`; it ends there if the last of it is an end token."""
    given, expected = [], []
    for i, (prompt, said) in enumerate(spoken):
        right = i % 2 == 0
        answer = text_of(said[:-1] if right else [*said[:-2], said[-1]])
        given.append({"prompt": prompt, "completion": answer.replace(" ", "  ") + "\n"})
        expected.append(right)
    ends = [2, *{said[-1] for _, said in spoken}]
    monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
    for prompt, said in spoken:  # nothing ends earlier
        assert not set(said[:-1]) & set(ends), prompt
    for size in (1, 4):
        found = evaluate(model, TOKENIZER, given, generate=True, batch_size=size)
        assert [row.exact for row in found.rows] == expected
        assert (found.overall.answered, found.overall.exact) == (4, 0.5)
        assert found.overall.exact_interval.low < 0.5 < found.overall.exact_interval.high


def test_an_answer_that_goes_on_is_not_exact(model, spoken):
    prompt, said = spoken[0]
    row = {"prompt": prompt, "completion": text_of(said)}
    assert evaluate(model, TOKENIZER, [row], generate=True).overall.exact == 0.0


def test_texts_are_not_generated_for(model):
    found = evaluate(model, TOKENIZER, rows(), generate=True)
    assert [row.exact is None for row in found.rows] == ["text" in row for row in rows()]
    assert found.overall.answered == 8


REFUSED = {
    "texts": ([{"text": "w1 w2"}], {}, "no row has an answer"),
    "short": ([{"prompt": "w1", "completion": "w2 w3"}], {"max_new_tokens": 2}, "has 3 tokens"),
    "cut": ([{"prompt": "w1", "completion": "w2 w3"}], {"max_length": 3}, "longer than max_length"),
    "no prompt": ([{"prompt": "", "completion": "w2 w3"}], {}, "row 1 has an empty prompt"),
    "batch": ([{"prompt": "w1", "completion": "w2"}], {"batch_size": 0}, "batch_size=0"),
}


@pytest.mark.parametrize(("given", "options", "message"), list(REFUSED.values()), ids=list(REFUSED))
def test_what_cannot_be_answered_is_refused(model, given, options, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(model, TOKENIZER, given, generate=True, **options)


def test_a_classifier_is_refused():
    from transformers import AutoModelForSequenceClassification

    classifier = tiny("llama", auto=AutoModelForSequenceClassification, num_labels=2)
    with pytest.raises(ConfigError, match="only language models"):
        evaluate(classifier, TOKENIZER, rows())


TEXTS = [row for row in rows(24) if "text" in row]


def test_forgetting_is_the_loss_with_the_adapter_minus_that_without(model):
    found = forgetting(model, TOKENIZER, TEXTS)
    assert found.on.rows == evaluate(model, TOKENIZER, TEXTS).rows
    base = evaluate(tiny("llama").double(), TOKENIZER, TEXTS)
    assert [row.nll for row in found.off.rows] == pytest.approx([row.nll for row in base.rows])
    rise = found.on.overall.nll - found.off.overall.nll
    assert abs(rise) > 1e-3
    assert found.change.nll.value == pytest.approx(rise)
    assert set(found.change.nll_by_domain) == {"a", "b"}
    assert json.loads(json.dumps(found.to_json()))["change"]["nll"]["value"] == pytest.approx(rise)


def test_an_adapter_that_changes_nothing_forgets_nothing():
    idle = adapt(tiny("llama"), moe_config("block", init_lora_weights=True))
    change = forgetting(idle, TOKENIZER, TEXTS).change.nll
    assert (change.value, change.p) == (0.0, 1.0)


def test_forgetting_needs_an_adapter_and_texts(model):
    with pytest.raises(ConfigError, match="no adapter to switch off"):
        forgetting(nn.Linear(2, 2), TOKENIZER, TEXTS)
    with pytest.raises(ConfigError, match="row 2 of the base's own text has no text"):
        forgetting(model, TOKENIZER, [{"text": "w1 w2"}, {"prompt": "w1", "completion": "w2"}])


def test_gradients_are_not_kept(model):
    with torch.enable_grad():
        evaluate(model, TOKENIZER, rows(3))
        assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_loss_that_is_not_finite_is_refused():
    broken = adapt(tiny("llama"), moe_config("layer"))
    for name, parameter in broken.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(float("nan"))
    with pytest.raises(ConfigError, match="loss of row 1 is nan"):
        evaluate(broken, TOKENIZER, [{"prompt": "w1", "completion": "w2"}])


def test_rows_are_cut_at_the_positions_that_the_model_has():
    gpt2 = tiny("gpt2")  # 64 positions
    found = evaluate(gpt2, TOKENIZER, [{"text": " ".join(["w1"] * 200)}])
    assert found.max_length == 64
    assert found.truncated == 1


def test_forgetting_leaves_a_frozen_adapter_frozen():
    model = adapt(tiny("llama"), moe_config("block"))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    forgetting(model, TOKENIZER, [{"text": "w1 w2 w3"}, {"text": "w4 w5"}])
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_router_that_sees_the_answer_is_warned_of():
    model = adapt(tiny("llama"), moe_config("block", router={"name": "top_k", "per": "sequence"}))
    with pytest.warns(UserWarning, match="looks at later tokens"):
        evaluate(model, TOKENIZER, [{"prompt": "w1 w2", "completion": " w3"}])
