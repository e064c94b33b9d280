"""Texts become batches that mix the domains, and every piece of a text is kept."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from moeadapt.errors import ConfigError
from moeadapt.report.texts import check_texts, pieces, spread, to_batches, tokenize
from tests.report.mixtures import TOKENIZER, two_domains


def byte_tokenizer():
    """One token per byte, as byte-level BPE without merges, with a first token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


def test_every_text_is_in_one_batch_and_padding_is_marked():
    texts = tokenize(two_domains(), TOKENIZER, 7)
    batches = to_batches(texts, 4, 0)
    assert sorted(i for batch in batches for i in batch.texts) == list(range(len(texts)))
    for batch in batches:
        ids = batch.inputs.inputs["input_ids"]
        positions, rows = batch.real()
        assert len(positions) == sum(batch.lengths)
        found = [ids.flatten()[positions[rows == row]].tolist() for row in range(len(batch.texts))]
        assert found == [texts[i].ids for i in batch.texts]
        assert max(batch.lengths) <= 7


def test_batches_mix_domains_in_proportion():
    texts = tokenize({"a": ["w1"] * 20, "b": ["w2"] * 10, "c": ["w3"] * 10}, TOKENIZER, 9)
    order = [texts[i].domain for i in spread(texts)]
    for start in range(0, 40, 8):
        own = order[start : start + 8]
        assert (own.count(0), own.count(1), own.count(2)) == (4, 2, 2)


def test_the_pieces_of_a_text_are_the_text():
    (text,) = tokenize({"a": ["w1  w2 \n w3"]}, TOKENIZER, 9)
    assert "".join(pieces(text, TOKENIZER)) == text.text
    assert len(pieces(text, TOKENIZER)) == len(text.ids) == 3


def test_a_character_of_several_tokens_is_said_once():
    tokenizer = byte_tokenizer()
    (text,) = tokenize({"a": ["aé €"]}, tokenizer, 99)
    found = pieces(text, tokenizer)
    assert len(found) == len(text.ids) == 1 + 1 + 2 + 1 + 3
    assert found[0] == "<s>"
    assert "".join(found[1:]) == text.text


def test_a_cut_text_has_as_many_pieces_as_tokens():
    (text,) = tokenize({"a": ["w1 w2 w3 w4"]}, TOKENIZER, 2)
    assert pieces(text, TOKENIZER) == ["w1", " w2"]


def test_a_slow_tokenizer_is_asked_token_by_token():
    class Slow:
        is_fast = False

        def decode(self, ids):
            return "".join(f"<{i}>" for i in ids)

    (text,) = tokenize({"a": ["w1 w2"]}, TOKENIZER, 9)
    assert pieces(text, Slow()) == [f"<{i}>" for i in text.ids]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({}, "empty"),
        (["w1"], "mapping"),
        ({"a": "w1"}, "list of texts"),
        ({"a": None}, "list of texts"),
        ({"a": []}, "domain 'a' has no texts"),
        ({"a": ["w1"], "b": ["w1", 3]}, "text 1 of domain 'b' is a int"),
    ],
)
def test_what_are_no_texts_is_refused(texts, message):
    with pytest.raises(ConfigError, match=message):
        check_texts(texts)


def test_a_text_without_tokens_is_refused():
    with pytest.raises(ConfigError, match="text 1 of domain 'a' has no tokens"):
        tokenize({"a": ["w1", " "]}, TOKENIZER, 9)


def test_labels_and_mask_have_one_shape():
    batch = to_batches(tokenize(two_domains(), TOKENIZER, 9), 8, 0)[0]
    shapes = {value.shape for value in batch.inputs.inputs.values()}
    assert shapes == {batch.inputs.labels.shape}
    assert all(value.dtype == torch.int64 for value in batch.inputs.inputs.values())
