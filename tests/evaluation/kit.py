"""A tiny adapter, rows of every form, and slow references."""

from collections.abc import Sequence
from typing import Any

import torch

from tests.tiny import adapt, moe_config, tiny
from tests.toy import sentences, toy_tokenizer

TOKENIZER = toy_tokenizer()


def model() -> Any:
    """Return a random model with a random adapter, in float64."""
    return adapt(tiny("llama"), moe_config("block")).double()


def rows(count: int = 12) -> list[dict[str, Any]]:
    """Return prompts, messages and texts of several lengths, in two domains."""
    texts = sentences(2 * count)
    found: list[dict[str, Any]] = []
    for i in range(count):
        one, other = texts[2 * i], texts[2 * i + 1]
        talk = [{"role": "user", "content": one}, {"role": "assistant", "content": other}]
        form = [{"prompt": one, "completion": other}, {"messages": talk}, {"text": one}][i % 3]
        found.append({**form, "domain": "ab"[i % 2]})
    return found


def words(text: str) -> list[int]:
    """Return the tokens of `text`, without special ones."""
    return [4 + int(word[1:]) for word in text.split()]


def tokens_of(row: dict[str, Any]) -> tuple[list[int], int]:
    """Return the tokens of a row and how many are its prompt, by hand."""
    if "text" in row:
        return words(row["text"]), 0
    if "messages" in row:
        prompt, answer = (words(message["content"]) for message in row["messages"])
    else:
        prompt, answer = words(row["prompt"]), words(row["completion"])
    return [*prompt, *answer, 2], len(prompt)


@torch.no_grad()
def slow_nll(model: Any, row: dict[str, Any]) -> tuple[float, int]:
    """Return the negative log likelihood of a row's answer, one token at a time, and its tokens."""
    ids, prompt = tokens_of(row)
    total, count = 0.0, 0
    for position in range(max(prompt, 1), len(ids)):
        logits = model(input_ids=torch.tensor([ids[:position]])).logits[0, -1]
        total -= float(logits.log_softmax(-1)[ids[position]])
        count += 1
    return total, count


@torch.no_grad()
def slow_answer(model: Any, prompt: Sequence[int], steps: int) -> list[int]:
    """Return the greedy continuation, without a cache."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]
