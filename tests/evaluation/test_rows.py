"""What of a row is scored, which rows are the same, and which are refused."""

import re

import pytest

from moeadapt.errors import ConfigError
from moeadapt.evaluation.rows import prepare, row_key
from tests.evaluation.kit import TOKENIZER, rows, tokens_of
from tests.toy import toy_tokenizer


def test_prompts_are_told_from_answers_in_every_form():
    for row, ready in zip(rows(), prepare(rows(), TOKENIZER, max_length=64), strict=True):
        ids, prompt = tokens_of(row)
        assert (ready.ids, ready.prompt) == (ids, prompt)
        assert ready.tokens == len(ids) - max(prompt, 1)
        assert (ready.answer is None) == ("text" in row)


def test_a_key_says_the_content_whatever_the_order_of_columns():
    row = {"prompt": "w1", "completion": "w2"}
    assert row_key(row) == row_key(dict(reversed(row.items())))
    others = [{**row, "completion": "w3"}, {**row, "domain": "a"}, {"text": "w1 w2"}]
    assert len({row_key(one) for one in [row, *others]}) == 4


def test_a_long_answer_is_cut_and_said_to_be():
    row = {"prompt": "w1 w2", "completion": "w3 w4 w5"}
    (whole,), (cut,) = (prepare([row], TOKENIZER, max_length=n) for n in (6, 4))
    assert (whole.tokens, whole.truncated) == (4, False)
    assert (cut.tokens, cut.truncated) == (2, True)


def test_only_the_last_message_is_scored():
    said = [("user", "w1 w2"), ("assistant", "w3"), ("user", "w4"), ("assistant", "w5 w6")]
    row = {"messages": [{"role": role, "content": content} for role, content in said]}
    (ready,) = prepare([row], TOKENIZER, max_length=64)
    assert ready.ids[ready.prompt :] == [4 + 5, 4 + 6, 2]
    assert ready.answer == "w5 w6"


def test_a_row_without_a_domain_is_other_where_some_have_one():
    both = [{"text": "w1 w2", "domain": "a"}, {"text": "w1 w2"}]
    assert [r.domain for r in prepare(both, TOKENIZER, max_length=8)] == ["a", "other"]
    assert [r.domain for r in prepare(both[1:], TOKENIZER, max_length=8)] == [None]


def asked(*roles):
    return {"messages": [{"role": role, "content": "w1"} for role in roles]}


REFUSED = {
    "none": ([], "there are no rows"),
    "column": ([{"text": "w1 w2"}, {"words": "w1"}], "row 2: a row has text"),
    "type": ([{"prompt": "w1", "completion": 5}], "row 1: completion is a int"),
    "long prompt": ([{"prompt": "w1 " * 8, "completion": "w2"}], "max_length=8 leaves no token"),
    "one token": ([{"text": "w1"}], "row 1 has 1 tokens, 0 of them its prompt"),
    "question": ([asked("user")], "the last of its 1 messages is from 'user'"),
    "answer alone": ([asked("assistant")], "after one message or more"),
}


@pytest.mark.parametrize(("given", "message"), list(REFUSED.values()), ids=list(REFUSED))
def test_a_row_that_cannot_be_scored_is_refused_with_its_number(given, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        prepare(given, TOKENIZER, max_length=8)


def test_tokenizers_that_cannot_do_it_are_refused():
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}w{{ loop.length }} {{ m.content }} {% endfor %}"
    )
    with pytest.raises(ConfigError, match="renders the conversation otherwise"):
        prepare([asked("user", "assistant")], tokenizer, max_length=8)
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        prepare([asked("user", "assistant")], tokenizer, max_length=8)
    tokenizer.pad_token = None
    with pytest.raises(ConfigError, match="no padding token"):
        prepare([{"text": "w1 w2"}], tokenizer, max_length=8)


def test_a_row_of_one_token_at_most_cannot_be_predicted():
    with pytest.raises(ConfigError, match="max_length=1"):
        prepare(rows(), TOKENIZER, max_length=1)
