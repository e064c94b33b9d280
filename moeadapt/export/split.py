"""Every expert of a mixture as an ordinary LoRA adapter of its own."""

from pathlib import Path

from torch import nn

from moeadapt.errors import ConfigError
from moeadapt.export.bank_layout import check_linear, expert_pair, is_unrouted, zero_pair
from moeadapt.export.low_rank import stack
from moeadapt.export.residual import constants
from moeadapt.hidden_folder import check_folder, new_folder
from moeadapt.tuner.layer import MoeLoraLinear
from moeadapt.tuner.plain import Pair, adapter_config, adapter_layers, plain_lora, save_plain

ALWAYS_ON = "shared"
"""Folder of what is always on: shared experts and the unrouted LoRA."""


def split(model: nn.Module, out_dir: str | Path, *, adapter: str = "default") -> dict[str, Path]:
    """Write each expert as a PEFT LoRA adapter, and what is always on as one more.

    Adapter e adds what expert e adds with weight 1, and nothing where there is no expert e.

    Args:
        model: the PEFT model with the mixture; it stays as it is.
        out_dir: folder to write, new or empty: `expert_0`, `expert_1`, ..., and `shared`.
        adapter: which adapter.

    Returns:
        Name of each folder -> its path.

    Raises:
        ConfigError: the model has no such adapter, its experts started off the base
            (`svd_segments`), or `out_dir` is occupied or its disk too full.
        UnsupportedError: the experts are no matrices.
        ExportError: `out_dir` was taken while it was written.
    """
    check_folder(out_dir)
    config = adapter_config(model, adapter)
    layers = adapter_layers(model, adapter)
    check_linear(layers, adapter)
    if config.init_lora_weights == "svd_segments":
        raise ConfigError(
            "init_lora_weights='svd_segments' takes a start off the base that belongs to no expert "
            "alone; use moeadapt.merge(method='single'), which keeps it beside the expert"
        )
    routed = {k: layer for k, layer in layers.items() if not is_unrouted(layer, adapter)}
    most = max(layer.moe_banks[adapter].size.num_experts for layer in routed.values())
    parts = {f"expert_{e}": _expert(routed, adapter, e) for e in range(most)}
    always = constants(layers, adapter)
    if any(pair is not None for pair in always.values()):
        parts[ALWAYS_ON] = {key: pair for key, pair in always.items() if pair is not None}
    need = sum(4 * (p.a.numel() + p.b.numel()) for pairs in parts.values() for p in pairs.values())
    with new_folder(out_dir, need) as folder:
        for name, pairs in parts.items():
            lora = plain_lora(model, pairs, adapter=adapter)  # type: ignore[arg-type]
            save_plain(lora, folder / name)
    return {name: Path(out_dir) / name for name in parts}


def _expert(layers: dict[str, MoeLoraLinear], adapter: str, expert: int) -> dict[str, Pair]:
    pairs = {}
    for key, layer in layers.items():
        bank = layer.moe_banks[adapter]
        here = expert < bank.size.num_experts
        pairs[key] = stack([expert_pair(bank, expert)]) if here else zero_pair(layer)
    return pairs
