"""Rows -> the tokens to score, the answers to generate, and keys that say which rows they are."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moeadapt.errors import ConfigError
from moeadapt.rows import Row, check_row, check_template, domains_of, encode


@dataclass(frozen=True, kw_only=True)
class EvalRow:
    """A row, ready for the model.

    Attributes:
        key: SHA-256 of its content.
        domain: its domain; None: no row has one.
        ids: its tokens, cut at `max_length`.
        prompt: how many of them are the prompt, which is not scored.
        answer: what should be generated after the prompt; None: the row is text, all of it scored.
        truncated: whether tokens were cut off.
    """

    key: str
    domain: str | None
    ids: list[int]
    prompt: int
    answer: str | None
    truncated: bool

    @property
    def tokens(self) -> int:
        """Tokens that are scored: the first of a row has nothing before it to be predicted from."""
        return len(self.ids) - max(self.prompt, 1)


def prepare(rows: Sequence[Row], tokenizer: Any, *, max_length: int) -> list[EvalRow]:
    """Tokenise rows. Of messages, the last one is the answer and the others are the prompt.

    Raises:
        ConfigError: there are no rows; a row has other columns, or no token to score within
            `max_length`; messages do not end with the assistant's, or cannot be rendered; the
            tokenizer has no padding token.
    """
    if max_length < 2:  # noqa: PLR2004
        raise ConfigError(f"max_length={max_length}: a prediction needs two tokens at least")
    if not rows:
        raise ConfigError("there are no rows to evaluate on")
    if tokenizer.pad_token_id is None:
        raise ConfigError("the tokenizer has no padding token; set tokenizer.pad_token")
    for number, row in enumerate(rows, 1):
        check_row(row, f"row {number}")
    check_template(rows, tokenizer)
    labelled = any("domain" in row for row in rows)
    domains = domains_of(rows) if labelled else [None] * len(rows)
    return [
        _prepare(row, domain, tokenizer, max_length, f"row {number}")
        for number, (row, domain) in enumerate(zip(rows, domains, strict=True), 1)
    ]


def row_key(row: Row) -> str:
    """Return the SHA-256 of a row's content, whatever the order of its columns."""
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()


def _prepare(row: Row, domain: str | None, tokenizer: Any, max_length: int, where: str) -> EvalRow:
    ids, prompt, answer = _encode(row, tokenizer, where)
    found = EvalRow(
        key=row_key(row),
        domain=domain,
        ids=ids[:max_length],
        prompt=prompt,
        answer=answer,
        truncated=len(ids) > max_length,
    )
    if found.tokens < 1:
        raise ConfigError(
            f"{where} has {len(ids)} tokens, {prompt} of them its prompt, so max_length="
            f"{max_length} leaves no token to score; raise max_length, or leave the row out"
        )
    return found


def _encode(row: Row, tokenizer: Any, where: str) -> tuple[list[int], int, str | None]:
    """Return the tokens, how many are the prompt, and the answer."""
    if "messages" not in row:
        ids, prompt = encode(row, tokenizer)
        return ids, prompt, None if "text" in row else row["completion"]
    *before, last = row["messages"]
    if last["role"] != "assistant" or not before:
        raise ConfigError(
            f"{where}: the last of its {len(before) + 1} messages is from {last['role']!r}; the "
            "answer to score is an assistant's, after one message or more"
        )
    ids, _ = encode(row, tokenizer)
    prompt = list(
        tokenizer.apply_chat_template(before, add_generation_prompt=True, return_dict=False)
    )
    if ids[: len(prompt)] != prompt:
        raise ConfigError(
            f"{where}: the chat template renders the conversation otherwise once it is answered, "
            "so the answer cannot be told from the prompt; give prompt and completion instead"
        )
    return ids, len(prompt), last["content"]
