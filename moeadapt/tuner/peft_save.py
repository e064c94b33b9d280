"""What `PeftModel` does when it saves or pushes an adapter of ours: the manifest, and a warning."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils.other import EMBEDDING_LAYER_NAMES as EMBEDDINGS

from moeadapt.adapter_format.manifest import remove_manifest
from moeadapt.tuner.config import MoeLoraConfig
from moeadapt.tuner.native_save import write_manifests


def save_pretrained(
    original: Callable[..., Any], self: PeftModel, save_directory: Any, *args: Any, **kwargs: Any
) -> None:
    """Save as PEFT does, and write the manifests of the folders that hold an adapter of ours."""
    ours = {n: c for n, c in self.peft_config.items() if isinstance(c, MoeLoraConfig)}
    is_main = kwargs.get("is_main_process", True)
    chosen = kwargs.get("selected_adapters") or list(self.peft_config)
    folders = {
        name: Path(save_directory) / ("" if name == "default" else name)
        for name in ours
        if name in chosen and is_main
    }
    for folder in folders.values():
        remove_manifest(folder)
    if len(args) < _EMBEDDINGS_AT and any(_targets_embeddings(ours[name]) for name in folders):
        # Experts on a head leave the head as it is, and a file with it would be refused.
        kwargs.setdefault("save_embedding_layers", False)
    original(self, save_directory, *args, **kwargs)
    write_manifests(folders.values(), self.get_base_model())


_EMBEDDINGS_AT = 3
"""Arguments of `save_pretrained` after the folder, up to `save_embedding_layers`."""


def _targets_embeddings(config: MoeLoraConfig) -> bool:
    targets = config.target_modules
    return not isinstance(targets, str) and any(name in EMBEDDINGS for name in targets or ())


def push_to_hub(
    original: Callable[..., Any], self: PeftModel, repo_id: str, *args: Any, **kwargs: Any
) -> Any:
    """Push as PEFT does, and say what that leaves out."""
    if any(isinstance(config, MoeLoraConfig) for config in self.peft_config.values()):
        warnings.warn(
            f"push_to_hub keeps a card that {repo_id} has, but writes none that says how to load "
            "this adapter, and sends the path of a base that is a folder; moeadapt.push(model, "
            f"{repo_id!r}) writes the card, and checks every file",
            stacklevel=3,
        )
    return original(self, repo_id, *args, **kwargs)
