"""Rows of a .jsonl file -> batches of tokens: what the verbs and the evaluation read.

Letters: B rows, S tokens of the longest row.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moeadapt.errors import ConfigError

Row = dict[str, Any]
"""`text`, or `prompt` and `completion`, or `messages`; and maybe `domain`."""


def read_rows(path: str) -> list[Row]:
    """Read a .jsonl file of rows with `text`, `prompt` and `completion`, or `messages`.

    All but `messages` (a list of `{"role": ..., "content": ...}`) are strings, also `domain`, which
    a row may have.

    Raises:
        ConfigError: the file cannot be read or is not UTF-8, or a row is no JSON, has other
            columns, or values of another type; names the line.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    rows = []
    for number, line in enumerate(data.split(b"\n"), 1):
        where = f"{path}:{number}"
        try:
            text = line.decode("utf-8")
            if not text.strip():
                continue
            row = json.loads(text)
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{where}: byte {error.start + 1} is not UTF-8 ({error.reason}); save it as UTF-8"
            ) from None
        except ValueError as error:
            raise ConfigError(f"{where}: not JSON: {error}") from None
        check_row(row, where)
        rows.append(row)
    if not rows:
        raise ConfigError(f"{path} has no rows")
    return rows


def check_row(row: Any, where: str) -> None:
    """Refuse what is no row; `where` names it in the message.

    Raises:
        ConfigError: it has other columns, or values of another type.
    """
    wanted = (("text",), ("prompt", "completion"), ("messages",))
    if not isinstance(row, dict) or not any(set(names) <= row.keys() for names in wanted):
        raise ConfigError(
            f"{where}: a row has text, or prompt and completion, or messages; and maybe domain"
        )
    for name in ("text", "prompt", "completion", "domain"):
        if name in row and not isinstance(row[name], str):
            raise ConfigError(
                f"{where}: {name} is a {type(row[name]).__name__}, not a string"
                + ("; leave it out" if name == "domain" else "; conversations go into messages")
            )
        if not _is_text(row.get(name, "")):
            raise ConfigError(f"{where}: {name} holds half of a surrogate pair, which is no text")
    messages = row.get("messages", [{"role": "", "content": ""}])
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise ConfigError(
            f'{where}: messages is a list of one or more {{"role": string, "content": string}}'
        )


def _is_text(value: str) -> bool:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _is_message(one: Any) -> bool:
    return isinstance(one, dict) and all(
        isinstance(one.get(name), str) and _is_text(one[name]) for name in ("role", "content")
    )


def to_batches(
    rows: list[Row], tokenizer: Any, *, max_length: int, batch_size: int = 8
) -> list[dict[str, Any]]:
    """Tokenise rows; the loss is on completions alone where rows have prompts.

    Raises:
        ConfigError: there are messages, and the tokenizer has no chat template.
    """
    check_template(rows, tokenizer)
    batches = []
    for start in range(0, len(rows), batch_size):
        own = rows[start : start + batch_size]
        coded = [encode(row, tokenizer) for row in own]
        batch = pad([ids[:max_length] for ids, _ in coded], [n for _, n in coded], tokenizer)
        if any("domain" in row for row in rows):
            batch["domain"] = domains_of(own)
        batches.append(batch)
    return batches


def domains_of(rows: Sequence[Row]) -> list[str]:
    """Return each row's domain; `other` where it has none."""
    return [str(row.get("domain", "other")) for row in rows]


def check_template(rows: Sequence[Row], tokenizer: Any) -> None:
    """Refuse messages where the tokenizer cannot render them.

    Raises:
        ConfigError: see above.
    """
    if any("messages" in row for row in rows) and not tokenizer.chat_template:
        raise ConfigError(
            "rows have messages, and the tokenizer of the base has no chat template; give text, or "
            "prompt and completion"
        )


def encode(row: Row, tokenizer: Any) -> tuple[list[int], int]:
    """Return the tokens of a row and how many of them are its prompt; of messages none is."""
    if "messages" in row:
        return list(tokenizer.apply_chat_template(row["messages"], return_dict=False)), 0
    if "text" in row:
        return list(tokenizer(row["text"])["input_ids"]), 0
    prompt = tokenizer(row["prompt"])["input_ids"]
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    said = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + eos
    return prompt + said, len(prompt)


def pad(coded: Sequence[list[int]], prompts: Sequence[int], tokenizer: Any) -> dict[str, Any]:
    """Pad tokens on the right; the labels are those behind the first `prompts[i]` tokens.

    Returns:
        `input_ids`, `attention_mask` and `labels`, each [rows, tokens].
    """
    import torch

    shape = (len(coded), max(map(len, coded)))
    ids_BS = torch.full(shape, tokenizer.pad_token_id)
    labels_BS = torch.full(shape, -100)
    mask_BS = torch.zeros(shape, dtype=torch.long)
    for i, (ids, prompt) in enumerate(zip(coded, prompts, strict=True)):
        ids_BS[i, : len(ids)] = torch.tensor(ids)
        labels_BS[i, prompt : len(ids)] = torch.tensor(ids[prompt:])
        mask_BS[i, : len(ids)] = 1
    return {"input_ids": ids_BS, "attention_mask": mask_BS, "labels": labels_BS}
