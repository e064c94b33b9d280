"""Greedy generation of each row's answer, and whether it is the one that was asked for.

Letters: B rows, S tokens of the longest prompt.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from moeadapt.errors import ConfigError
from moeadapt.evaluation.rows import EvalRow
from moeadapt.evaluation.score import batches
from moeadapt.tuner.probe import evaluating

SPARE = 8
"""Tokens beyond those of the answer, since the same words may be said in a few tokens more."""


def exact_matches(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[EvalRow],
    *,
    batch_size: int,
    max_new_tokens: int | None = None,
) -> list[bool | None]:
    """Say for each row whether greedy generation gives its answer; None: the row has none.

    Args:
        model: a causal language model, in any wrapper that can `generate`.
        tokenizer: its tokenizer.
        rows: from `prepare`.
        batch_size: rows generated for together.
        max_new_tokens: tokens generated at most; None: for each row those of its answer and
            `SPARE` more.

    Raises:
        ConfigError: no row has an answer, or one could not be given within `max_new_tokens`.
    """
    asked = [i for i, row in enumerate(rows) if row.answer is not None]
    if not asked:
        raise ConfigError(
            "no row has an answer to generate; give prompt and completion, or messages"
        )
    budgets = {i: _budget(rows[i], i + 1, max_new_tokens) for i in asked}
    found: list[bool | None] = [None] * len(rows)
    own = [rows[i] for i in asked]
    with evaluating(model):
        for index in batches(own, batch_size, lambda row: row.prompt):
            some = [asked[i] for i in index]
            prompts = [rows[i].ids[: rows[i].prompt] for i in some]
            said = _generate(model, tokenizer, prompts, max(budgets[i] for i in some))
            for i, ids in zip(some, said, strict=True):
                # A row's answer must not depend on what it was batched with.
                text = tokenizer.decode(ids[: budgets[i]], skip_special_tokens=True)
                found[i] = _words(text) == _words(str(rows[i].answer))
    return found


def _budget(row: EvalRow, number: int, max_new_tokens: int | None) -> int:
    if row.prompt == 0:
        raise ConfigError(f"row {number} has an empty prompt, after which nothing is generated")
    if row.truncated:
        raise ConfigError(
            f"row {number} is longer than max_length, and a part of an answer cannot be matched; "
            "raise max_length, or leave the row out"
        )
    if max_new_tokens is None:
        return row.tokens + SPARE
    if row.tokens > max_new_tokens:
        raise ConfigError(
            f"the answer of row {number} has {row.tokens} tokens, more than max_new_tokens="
            f"{max_new_tokens}; raise it, or leave it out"
        )
    return max_new_tokens


def _words(text: str) -> list[str]:
    return text.split()


def _generate(
    model: Any, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int
) -> list[list[int]]:
    """Return the tokens after each prompt, greedily, whatever the model's own settings are."""
    width = max(map(len, prompts))
    ids_BS = torch.full((len(prompts), width), tokenizer.pad_token_id)
    mask_BS = torch.zeros_like(ids_BS)
    for i, prompt in enumerate(prompts):
        ids_BS[i, width - len(prompt) :] = torch.tensor(prompt)
        mask_BS[i, width - len(prompt) :] = 1
    device = next(model.parameters()).device
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_length=0,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=answer_ends(model, tokenizer),
    )
    out = model.generate(
        input_ids=ids_BS.to(device), attention_mask=mask_BS.to(device), generation_config=settings
    )
    return [_until_end(ids, settings.eos_token_id) for ids in out[:, width:].tolist()]


def answer_ends(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's, and those the model knows of."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    known = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id]
    return sorted({token for token in known if token is not None})


def _until_end(ids: list[int], ends: Any) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[:end]
