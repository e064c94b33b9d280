"""A dense checkpoint with a plain LoRA adapter merged into what is read, tensor by tensor."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from moeadapt.errors import ConfigError
from moeadapt.export.source import FolderSource, Source, hash_files
from moeadapt.tuner.plain_reader import read_plain


class LoraSource(Source):
    """Reads W + scale * B A where the adapter has a pair, W elsewhere."""

    def __init__(self, base: Source, folder: str | Path) -> None:
        """Read the adapter of `folder`.

        Raises:
            ConfigError: it is no plain LoRA in safetensors, or was trained on another base.
        """
        self.config, self.folder = base.config, base.folder
        self._base, self._adapter = base, Path(folder)
        self._pairs = {f"{key}.weight": pair for key, pair in read_plain(folder).items()}
        known = base.tensors()
        for name, pair in self._pairs.items():
            shape = (pair.b.shape[0], pair.a.shape[1])
            if name not in known or known[name][0] != shape:
                there = known[name][0] if name in known else "no such tensor"
                raise ConfigError(
                    f"{folder} changes {name} {shape}, and the base has {there}; was it trained on "
                    "another base?"
                )

    def tensors(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """See `Source.tensors`."""
        return self._base.tensors()

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """See `Source.read`; in float32 where the adapter adds something."""
        value = self._base.read(name, rows)
        if name not in self._pairs:
            return value
        pair = self._pairs[name]
        b = pair.b if rows is None else pair.b[rows[0] : rows[1]]
        return value.float().addmm_(b.float(), pair.a.float(), alpha=pair.scale)

    def fingerprint(self) -> str:
        """See `Source.fingerprint`; that of the adapter."""
        return hash_files([self._adapter / "adapter_model.safetensors"])


def open_variant(base: Source, folder: str | Path) -> Source:
    """Return a reader of a fine-tuned checkpoint or of a LoRA adapter of `base`.

    Raises:
        ConfigError: it is neither, or its tensors are not those of `base`.
    """
    folder = Path(folder)
    if (folder / "adapter_config.json").is_file():
        return LoraSource(base, folder)
    source = FolderSource(folder)
    ours = {name: shape for name, (shape, _) in base.tensors().items()}
    theirs = {name: shape for name, (shape, _) in source.tensors().items()}
    other = sorted(
        name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)
    )
    if other or source.config.model_type != base.config.model_type:
        raise ConfigError(
            f"{folder} is not a fine-tuned copy of the base: {len(other)} tensors differ in name "
            f"or shape, first {other[:3]}"
        )
    _check_config(base, source, folder)
    return source


BOOKKEEPING = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "initializer_range",
        "max_position_embeddings",
        "pad_token_id",
        "transformers_version",
        "use_cache",
    }
)
"""Settings that do not change what a forward in eval mode computes."""


def _check_config(base: Source, source: Source, folder: Path) -> None:
    ours, theirs = (s.config.to_dict() for s in (base, source))
    other = sorted(
        name
        for name in (ours.keys() | theirs.keys()) - BOOKKEEPING
        if ours.get(name) != theirs.get(name)
    )
    if other:
        shown = ", ".join(f"{n}={theirs.get(n)!r} (base {ours.get(n)!r})" for n in other[:3])
        raise ConfigError(
            f"{folder} computes otherwise than the base: {shown}; experts of one mixture share "
            "every setting, so take the copy with those settings as the base, or leave it out"
        )
