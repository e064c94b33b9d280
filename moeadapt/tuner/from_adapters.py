"""Experts that start as trained LoRA adapters, one adapter per expert."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moeadapt.errors import ConfigError
from moeadapt.experts import ExpertBank
from moeadapt.experts.lora import LoraBank
from moeadapt.tuner.adapter_layer import PREFIX
from moeadapt.tuner.layer import MoeLoraLinear
from moeadapt.tuner.plain import adapter_layers
from moeadapt.tuner.plain_reader import ScaledPair, read_plain
from moeadapt.tuner.segments import START_NAMES


def init_from_adapters(
    model: nn.Module, folders: Sequence[str | Path], *, adapter: str = "default"
) -> None:
    """Make trained LoRA adapters the experts: expert e adds exactly what adapter e added.

    Ranks that an adapter does not fill have zero B, so they add nothing until they are trained; B
    is multiplied by the adapter's scale over the expert's. Shared experts and routers stay.

    Args:
        model: the model with a moeadapt adapter, in any wrapper.
        folders: one folder of a saved PEFT LoRA adapter per expert.
        adapter: which moeadapt adapter.

    Raises:
        ConfigError: a folder holds no plain LoRA adapter in safetensors, their number is not that
            of the experts, or their modules, ranks or shapes do not fit. Nothing is changed then.

    Example:
        >>> moeadapt.init_from_adapters(model, ["adapters/math", "adapters/code"])
    """
    if isinstance(folders, str | Path):
        raise ConfigError(f"folders={str(folders)!r} is one folder; give a list, one per expert")
    layers = adapter_layers(model, adapter)
    for key, layer in layers.items():
        _check_bank(key, layer, adapter, len(folders))
    adapters = [read_plain(folder) for folder in folders]
    banks = {key: layer.moe_banks[adapter] for key, layer in layers.items()}
    for expert, (folder, pairs) in enumerate(zip(folders, adapters, strict=True)):
        _check_pairs(folder, pairs, banks, expert)
    for key, layer in layers.items():
        for expert, pairs in enumerate(adapters):
            _write(layer.moe_banks[adapter], expert, pairs[key])


def _check_bank(key: str, layer: MoeLoraLinear, adapter: str, found: int) -> None:
    bank = layer.moe_banks[adapter]
    if layer.moe_plans[adapter].placement == "unrouted":
        raise ConfigError(
            f"{key!r} has no routed experts under placement='ffn', so {found} adapters cannot "
            "become its experts; target the FFN alone, or use placement='linear'"
        )
    starts: Any = getattr(layer, PREFIX + START_NAMES[0])
    plain = isinstance(bank, LoraBank) and not getattr(bank.config, "orthogonalize", False)
    if not plain or bank.frozen or adapter in starts:
        raise ConfigError(
            f"the experts of {key!r} cannot start from LoRA adapters; use experts='lora', 'rank1' "
            "with adapters of rank 1, or 'heterogeneous', and init_lora_weights=True"
        )
    if bank.size.num_experts != found:
        raise ConfigError(
            f"{found} adapters for the {bank.size.num_experts} routed experts of {key!r}; give one "
            "folder per expert"
        )


def _check_pairs(
    folder: str | Path, pairs: dict[str, ScaledPair], banks: dict[str, ExpertBank], expert: int
) -> None:
    other = sorted(pairs.keys() ^ banks.keys())
    if other:
        shown = ", ".join(map(repr, other[:5])) + (" ..." if len(other) > 5 else "")  # noqa: PLR2004
        raise ConfigError(
            f"{folder} was trained on other modules than this adapter targets: {shown} are on one "
            "side only; use the same target_modules"
        )
    for key, pair in pairs.items():
        size = banks[key].size
        shape = (pair.a.shape[1], pair.b.shape[0])
        if shape != (size.in_features, size.out_features):
            raise ConfigError(
                f"{folder}: {key!r} maps {shape[0]} -> {shape[1]}, but the model's maps "
                f"{size.in_features} -> {size.out_features}; was it trained on another base?"
            )
        if pair.a.shape[0] > size.all_ranks[expert]:
            raise ConfigError(
                f"{folder}: {key!r} has rank {pair.a.shape[0]}, more than the "
                f"{size.all_ranks[expert]} of expert {expert}; raise r"
            )
        if not all(torch.isfinite(x).all() for x in (pair.a, pair.b)):
            raise ConfigError(f"{folder}: {key!r} holds numbers that are not finite")


def _write(bank: ExpertBank, expert: int, pair: ScaledPair) -> None:
    start, rank = sum(bank.size.all_ranks[:expert]), pair.a.shape[0]
    a, b = bank.factor("lora_A").weight, bank.factor("lora_B").weight
    with torch.no_grad():
        a[start : start + rank].copy_(pair.a)
        own = b[:, start : start + bank.size.all_ranks[expert]]
        own.zero_()
        own[:, :rank].copy_(pair.b.to(own) * (pair.scale / bank.size.scale))
