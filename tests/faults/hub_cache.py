"""Configurations where a run looks for them: in a hub cache, or in a folder made before."""

from pathlib import Path
from typing import Any

from transformers import MixtralConfig

from tests.tiny import MODELS, MODERN

REVISION = "0" * 40


def add_config(home: Path, name: str, architecture: str) -> None:
    """Put the tiny configuration of an architecture where the hub's `name` would be.

    Args:
        home: what HF_HOME says.
        name: `owner/model` on the hub.
        architecture: one of `tests.tiny.MODELS`.
    """
    folder = home / "hub" / f"models--{name.replace('/', '--')}"
    MODELS[architecture]().save_pretrained(folder / "snapshots" / REVISION)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(REVISION)


def add_upcycled(folder: Path) -> None:
    """Put the configuration of a tiny stock mixture into a folder."""
    fields: dict[str, Any] = {**MODERN, "num_local_experts": 4, "num_experts_per_tok": 2}
    MixtralConfig(architectures=["MixtralForCausalLM"], **fields).save_pretrained(folder)
