"""A toy tokenizer and toy datasets: words w0..w99 that count up, no downloads."""

import random

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(100)]

CHAT = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + ' </s> ' }}{% endgeneration %}{% else %}{{ m.content + ' ' }}{% endif %}"
    "{% endfor %}"
)


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, ids 4..103, with a chat template that marks the assistant's words."""
    special = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    vocabulary = {**special, **{word: i + len(special) for i, word in enumerate(WORDS)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def sentences(count: int, seed: int = 0) -> list[str]:
    """Return arithmetic progressions of 4 to 12 words."""
    generator = random.Random(seed)

    def sentence() -> str:
        start, step = generator.randrange(100), generator.randrange(1, 4)
        length = generator.randrange(4, 13)
        return " ".join(WORDS[(start + step * i) % 100] for i in range(length))

    return [sentence() for _ in range(count)]


def toy_text(count: int = 32, seed: int = 0) -> Dataset:
    """Return rows for language modelling."""
    return Dataset.from_dict({"text": sentences(count, seed)})


def toy_chat(count: int = 32, seed: int = 0) -> Dataset:
    """Return rows of one question and one answer."""
    texts = sentences(2 * count, seed)
    rows = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in zip(texts[:count], texts[count:], strict=True)
    ]
    return Dataset.from_dict({"messages": rows})


def toy_preferences(count: int = 32, seed: int = 0) -> Dataset:
    """Return rows of a prompt, a chosen and a rejected answer."""
    texts = sentences(3 * count, seed)
    return Dataset.from_dict(
        {
            "prompt": texts[:count],
            "chosen": texts[count : 2 * count],
            "rejected": texts[2 * count :],
        }
    )


def toy_labelled(count: int = 32, seed: int = 0) -> Dataset:
    """Return rows of a prompt, an answer, and whether it is good."""
    texts = sentences(2 * count, seed)
    good = [i % 2 == 0 for i in range(count)]
    return Dataset.from_dict({"prompt": texts[:count], "completion": texts[count:], "label": good})


def toy_prompts(count: int = 32, seed: int = 0) -> Dataset:
    """Return rows of a prompt alone."""
    return Dataset.from_dict({"prompt": sentences(count, seed)})
