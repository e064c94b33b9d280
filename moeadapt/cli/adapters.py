"""What verbs on a trained adapter share: the options, the model behind a folder, rows of a file."""

import json
from pathlib import Path
from typing import Any

from moeadapt.adapter_folder import read_settings
from moeadapt.errors import AssetError, ConfigError

ADAPTER_HELP = "Folder of a saved moeadapt adapter."
BASE_HELP = "Base model; default: the one the adapter names."
DTYPE_HELP = "Type the base is loaded in: auto, float32, bfloat16 or float16."


DTYPES = ("float32", "bfloat16", "float16")


def check_dtype(name: str | None) -> None:
    """Refuse what is no type to load or write weights in; None is whatever they have.

    Raises:
        ConfigError: see above.
    """
    if name is not None and name not in DTYPES:
        raise ConfigError(f"--dtype {name!r}: one of {list(DTYPES)}")


def load_adapter(folder: str, base: str | None, dtype: str) -> tuple[Any, Any]:
    """Load a mixture and its tokenizer.

    Raises:
        ConfigError: `folder` holds no moeadapt adapter.
        AssetError: a file or the base model cannot be read.
    """
    settings = read_settings(folder, "MOEADAPT")
    name = base or settings.get("base_model_name_or_path")
    if not name:
        raise ConfigError(f"{folder} does not say what its base model is; give --base")
    if dtype != "auto":
        check_dtype(dtype)
    from peft import PeftModel
    from safetensors import SafetensorError

    from moeadapt.training.base_model import load_base
    from moeadapt.training.objectives import OBJECTIVES
    from moeadapt.training.recipe import RunArguments

    run = RunArguments(model_name_or_path=name, dtype=dtype)  # type: ignore[arg-type]
    model, tokenizer = load_base(run, OBJECTIVES["sft"])
    try:
        mixture = PeftModel.from_pretrained(model, folder)
    except (OSError, SafetensorError) as error:
        raise AssetError(f"cannot read the adapter {folder}: {error}") from error
    mixture.peft_config["default"].base_model_name_or_path = name
    return mixture.eval(), tokenizer


def read_config(folder: str) -> Any:
    """Read the `MoeLoraConfig` of a saved mixture, without its weights and its base.

    Raises:
        ConfigError: `folder` holds no moeadapt adapter, or its settings are wrong.
    """
    read_settings(folder, "MOEADAPT")
    from moeadapt.tuner.config import MoeLoraConfig

    return MoeLoraConfig.from_pretrained(folder)


def read_rows(path: str) -> list[dict[str, Any]]:
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
        _check_row(row, where)
        rows.append(row)
    if not rows:
        raise ConfigError(f"{path} has no rows")
    return rows


def _check_row(row: Any, where: str) -> None:
    wanted = (("text",), ("prompt", "completion"), ("messages",))
    if not isinstance(row, dict) or not any(set(names) <= row.keys() for names in wanted):
        raise ConfigError(
            f"{where}: a row has text, or prompt and completion, or messages; and maybe domain"
        )
    for name in ("text", "prompt", "completion", "domain"):
        if name in row and not isinstance(row[name], str):
            raise ConfigError(
                f"{where}: {name} is a {type(row[name]).__name__}, not a string; conversations go "
                "into messages"
            )
    messages = row.get("messages", [{"role": "", "content": ""}])
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise ConfigError(
            f'{where}: messages is a list of one or more {{"role": string, "content": string}}'
        )


def _is_message(one: Any) -> bool:
    return isinstance(one, dict) and all(
        isinstance(one.get(name), str) for name in ("role", "content")
    )


def to_batches(
    rows: list[dict[str, Any]], tokenizer: Any, *, max_length: int, batch_size: int = 8
) -> list[dict[str, Any]]:
    """Tokenise rows; the loss is on completions alone where rows have prompts.

    Raises:
        ConfigError: there are messages, and the tokenizer has no chat template.
    """
    import torch

    if any("messages" in row for row in rows) and not tokenizer.chat_template:
        raise ConfigError(
            "rows have messages, and the tokenizer of the base has no chat template; give text, or "
            "prompt and completion"
        )
    batches = []
    for start in range(0, len(rows), batch_size):
        own = rows[start : start + batch_size]
        coded = [_encode(row, tokenizer, max_length) for row in own]
        width = max(len(ids) for ids, _ in coded)
        ids_BS = torch.full((len(own), width), tokenizer.pad_token_id)
        labels_BS = torch.full((len(own), width), -100)
        mask_BS = torch.zeros((len(own), width), dtype=torch.long)
        for i, (ids, prompt) in enumerate(coded):
            ids_BS[i, : len(ids)] = torch.tensor(ids)
            labels_BS[i, prompt : len(ids)] = torch.tensor(ids[prompt:])
            mask_BS[i, : len(ids)] = 1
        batch: dict[str, Any] = {
            "input_ids": ids_BS,
            "attention_mask": mask_BS,
            "labels": labels_BS,
        }
        if any("domain" in row for row in rows):
            batch["domain"] = [str(row.get("domain", "other")) for row in own]
        batches.append(batch)
    return batches


def _encode(row: dict[str, Any], tokenizer: Any, max_length: int) -> tuple[list[int], int]:
    """Return the tokens of a row and how many of them are its prompt."""
    if "messages" in row:
        ids = tokenizer.apply_chat_template(row["messages"], return_dict=False)
        return list(ids)[:max_length], 0
    if "text" in row:
        return tokenizer(row["text"])["input_ids"][:max_length], 0
    prompt = tokenizer(row["prompt"])["input_ids"]
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    said = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + eos
    return (prompt + said)[:max_length], min(len(prompt), max_length)
