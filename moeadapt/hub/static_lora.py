"""An ordinary LoRA beside the mixture, for engines that do not know moeadapt."""

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from peft import PeftModel

from moeadapt.adapter_format.settings import SETTINGS, WEIGHTS
from moeadapt.embedded import cache_folder, find_model
from moeadapt.errors import AssetError, ConfigError
from moeadapt.hub.parcel import Parcel
from moeadapt.rows import to_batches

FOLDER = "static-lora"
MAX_LENGTH = 1024
"""Tokens of a row that are looked at."""


def load_adapter(
    folder: Path, facts: dict[str, Any], place: str | None, *, offline: bool = False
) -> tuple[PeftModel, Any]:
    """Load an adapter on the base that it names, through the checks of loading, and a tokenizer.

    Args:
        folder: of the adapter.
        facts: its settings, the base by its id.
        place: the base on this machine; None: it is loaded by its id.
        offline: take the base from this machine only.

    Raises:
        AssetError: the base cannot be had.
    """
    from moeadapt.training.base_model import load_base
    from moeadapt.training.objectives import OBJECTIVES
    from moeadapt.training.recipe import RunArguments

    asked = place or facts["base_model_name_or_path"]
    name = _on_this_machine(asked) if offline else asked
    goal = OBJECTIVES["reward" if facts.get("task_type") == "SEQ_CLS" else "sft"]
    run = RunArguments(model_name_or_path=name, dtype="auto")  # type: ignore[arg-type]
    model, tokenizer = load_base(run, goal)
    if offline and find_model(asked) is None:
        model.name_or_path = asked  # a snapshot of the cache is that model
    return PeftModel.from_pretrained(model, str(folder)).eval(), tokenizer


def _on_this_machine(name: str) -> str:
    """Return the folder of a base: itself, a built-in one, or a snapshot in the hub's cache."""
    if Path(name).is_dir():
        return name
    built_in = find_model(name)
    if built_in is not None:
        config = cache_folder() / built_in.folder / "config.json"
        found = str(config) if config.is_file() else None
        get = f"use {name} once"
    else:
        found = try_to_load_from_cache(name, "config.json")
        get = f"fetch it first (`hf download {name}`)"
    if not isinstance(found, str):
        raise AssetError(
            f"a dry run uses no network, and the base {name!r}, which with_static_lora needs, is "
            f"not on this machine; {get}, or leave with_static_lora out of the dry run"
        )
    return str(Path(found).parent)


def add_static_lora(
    parcel: Parcel,
    model: PeftModel,
    adapter: str,
    *,
    data: Iterable[Any] | None = None,
    tokenizer: Any = None,
) -> None:
    """Merge the mixture into a LoRA and add it in the folder `static-lora`.

    Args:
        parcel: of the adapter.
        model: with the adapter.
        adapter: its name in `model`.
        data: what the merge looks at, by `least_squares`: as for `moeadapt.merge`, or rows as a
            .jsonl file has them; None: `uniform`, the mean of the experts, and nothing is measured.
        tokenizer: for texts and rows.

    Raises:
        ConfigError, UnsupportedError: see `moeadapt.merge`.
    """
    from moeadapt.export.merge import merge

    method = "uniform" if data is None else "least_squares"
    data = None if data is None else _batches(list(data), tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / FOLDER
        result = merge(model, out, method, data=data, tokenizer=tokenizer, adapter=adapter)
        settings = json.loads((out / SETTINGS).read_text(encoding="utf-8"))
        settings["base_model_name_or_path"] = parcel.base_model
        text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
        parcel.files[f"{FOLDER}/{SETTINGS}"] = text.encode()
        parcel.files[f"{FOLDER}/{WEIGHTS}"] = (out / WEIGHTS).read_bytes()
    parcel.facts["static_lora"] = {"method": method, "mean_residual": result.mean_residual}


def _batches(data: list[Any], tokenizer: Any) -> list[Any]:
    """Return rows as batches, and everything else as it is."""
    if not data or not isinstance(data[0], dict) or "input_ids" in data[0]:
        return data
    if tokenizer is None:
        raise ConfigError("data: rows of text need tokenizer=, that of the base")
    return to_batches(data, tokenizer, max_length=MAX_LENGTH)
