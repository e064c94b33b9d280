"""Checks what the first rows of upcycled routers are made from, and turns texts into token ids."""

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import AutoTokenizer

from moeadapt.errors import ConfigError, did_you_mean
from moeadapt.export.gates import GATE_INITS, GateInit
from moeadapt.export.source import Source

DEFAULT_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class GateSettings:
    """How the first rows are made, checked.

    Attributes:
        init: random, hidden or kmeans.
        std: of random rows, above 0; None for the others.
        ids: token ids [tokens] of each text, at least one token each: for hidden one list per
            copy of the FFN, for kmeans one list, for random none.
    """

    init: str
    std: float | None
    ids: list[list[Tensor]]


def read_gate_settings(
    dense: Source, copies: int, init: str, texts: Any, std: float | None
) -> GateSettings:
    """Return the settings with texts as token ids; runs no model.

    Raises:
        ConfigError: a setting is unknown, out of range or without effect, there are too few texts,
            or a text is no text.
    """
    if init not in GATE_INITS:
        raise ConfigError(
            f"unknown gate_init {init!r}; one of {list(get_args(GateInit))}"
            f"{did_you_mean(init, GATE_INITS)}"
        )
    if init == "random":
        if texts is not None:
            raise ConfigError(
                "gate_init='random' takes no gate_texts, they have no effect there; leave them out "
                "or set gate_init to 'hidden' or 'kmeans'"
            )
        return GateSettings(init=init, std=_checked_std(std), ids=[])
    if std is not None:
        raise ConfigError(
            f"gate_std={std} has no effect with gate_init={init!r}, whose rows have length 1; "
            "leave it out"
        )
    if texts is None:
        raise ConfigError(f"gate_init={init!r} needs gate_texts")
    return GateSettings(init=init, std=None, ids=_Reader(dense).read(init, texts, copies))


def _checked_std(std: float | None) -> float:
    if std is None:
        return DEFAULT_STD
    if not 0 < std < float("inf"):
        raise ConfigError(f"gate_std={std}: above 0; equal rows send all tokens one way")
    return std


class _Reader:
    """Reads texts; loads the tokenizer of the base at the first string."""

    def __init__(self, dense: Source) -> None:
        self._dense = dense
        self._vocab: int = dense.config.vocab_size
        self._tokenizer: Any = None

    def read(self, init: str, texts: Any, copies: int) -> list[list[Tensor]]:
        given = _items(texts)
        if init == "kmeans":
            if not given:
                raise ConfigError("gate_init='kmeans' needs gate_texts: a list of texts, not one")
            group = [self._one(text, f"gate_texts[{i}]") for i, text in enumerate(given)]
            tokens = sum(map(len, group))
            if tokens < copies:
                raise ConfigError(
                    f"gate_init='kmeans': {tokens} tokens for {copies} experts; give more "
                    "gate_texts"
                )
            return [group]
        groups = [_items(group) for group in given or []]
        lacking = [expert for expert, group in enumerate(groups) if not group]
        if len(groups) != copies or lacking:
            raise ConfigError(
                f"gate_init='hidden' needs gate_texts of {copies} lists of prompts, one per expert"
                + (f"; {lacking} are no such lists or empty" if lacking else "")
            )
        return [
            [self._one(text, f"gate_texts[{i}][{j}]") for j, text in enumerate(group or [])]
            for i, group in enumerate(groups)
        ]

    def _one(self, text: Any, where: str) -> Tensor:
        if isinstance(text, str):
            ids = self._encode(text) if text.strip() else []
        else:
            ids = text if isinstance(text, Tensor) else _items(text)
        try:
            if ids is None:
                raise TypeError
            # not straight to int64: that would cut fractions off
            found = torch.as_tensor(ids).cpu()
        except (TypeError, ValueError, RuntimeError, OverflowError):
            kind = type(text).__name__
            raise ConfigError(f"{where} is a {kind} and no text; {self._allowed}") from None
        if found.numel() == 0:
            raise ConfigError(f"{where} has no tokens; leave it out")
        if found.dim() == 2 and len(found) == 1:  # noqa: PLR2004
            found = found[0]
        whole = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
        if found.dim() != 1 or not whole:
            raise ConfigError(
                f"{where} has the shape {tuple(found.shape)} and {found.dtype}; {self._allowed}"
            )
        found = found.long()
        low, high = int(found.min()), int(found.max())
        if low < 0 or high >= self._vocab:
            raise ConfigError(f"{where} holds token ids in [{low}, {high}]; {self._allowed}")
        return found

    @property
    def _allowed(self) -> str:
        return f"a text is a string, or token ids in [0, {self._vocab})"

    def _encode(self, text: str) -> list[int]:
        if self._tokenizer is None:
            self._tokenizer = self._load()
        return list(self._tokenizer(text)["input_ids"])

    def _load(self) -> Any:
        folder = self._dense.folder
        if folder is None:
            raise ConfigError("gate_texts of a model in memory must be token ids, not text")
        try:
            return AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError(f"{folder} has no tokenizer for gate_texts: {error}") from error


def _items(value: Any) -> list[Any] | None:
    """Return what an ordered collection holds; None if it is none, or is one text."""
    if isinstance(value, Tensor):
        return list(value) if value.dim() > 1 else None
    if isinstance(value, str | bytes | Mapping | Set) or not isinstance(value, Iterable):
        return None
    return list(value)
