"""Experts that start as trained LoRA adapters, one adapter per expert.

Letters: D in, O out, r rank of one expert.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from moeadapt.errors import ConfigError
from moeadapt.experts import ExpertBank
from moeadapt.experts.lora import LoraBank
from moeadapt.tuner.inspect import require_context
from moeadapt.tuner.layer import PREFIX, MoeLoraLinear
from moeadapt.tuner.segments import START_NAMES


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """What one adapter adds to one linear: scale * B A."""

    a: Float[Tensor, "r D"]
    b: Float[Tensor, "O r"]
    scale: float


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
    require_context(model)
    layers = {
        m.moe_plans[adapter].key: m
        for m in model.modules()
        if isinstance(m, MoeLoraLinear) and adapter in m.moe_banks
    }
    if not layers:
        raise ConfigError(f"the model has no moeadapt adapter {adapter!r}")
    for key, layer in layers.items():
        _check_bank(key, layer, adapter, len(folders))
    adapters = [_read(Path(folder)) for folder in folders]
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


def _read(folder: Path) -> dict[str, _Pair]:
    config, tensors = _files(folder)
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        key, _, factor = name.removesuffix(".weight").rpartition(".")
        if factor not in ("lora_A", "lora_B") or not name.endswith(".weight"):
            raise ConfigError(f"{folder} holds {name!r}, which is not part of a plain LoRA")
        pairs.setdefault(key.removeprefix("base_model.model."), {})[factor] = tensor
    read = {}
    for key, pair in pairs.items():
        if len(pair) != 2 or pair["lora_A"].shape[0] != pair["lora_B"].shape[1]:  # noqa: PLR2004
            raise ConfigError(f"{folder}: lora_A and lora_B of {key!r} do not belong together")
        scale = _scale(config, key, pair["lora_A"].shape[0])
        read[key] = _Pair(a=pair["lora_A"], b=pair["lora_B"], scale=scale)
    return read


def _files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    paths = [folder / "adapter_config.json", folder / "adapter_model.safetensors"]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ConfigError(
            f"{folder} has no {' and no '.join(missing)}; give the folder of an adapter saved with "
            "model.save_pretrained (pickled .bin files are not read)"
        )
    try:
        config, tensors = json.loads(paths[0].read_text(encoding="utf-8")), load_file(paths[1])
    except (ValueError, SafetensorError) as error:
        raise ConfigError(f"{folder} is damaged: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ConfigError(f"{folder} is no LoRA adapter: peft_type is not 'LORA'")
    odd = [name for name in _NOT_PLAIN if config.get(name)]
    if config.get("bias", "none") != "none":
        odd.append("bias")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_THE_BASE):
        odd.append(f"init_lora_weights={start!r}, which changes the base")
    if odd:
        raise ConfigError(
            f"{folder} is not a plain LoRA: it uses {', '.join(odd)}; an expert is a pair A and B "
            "beside an unchanged base"
        )
    return config, tensors


# What makes a LoRA adapter more than its pairs of matrices.
_NOT_PLAIN = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "lora_bias",
    "megatron_config",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
)
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def _scale(config: dict[str, Any], key: str, rank: int) -> float:
    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), key), config.get("lora_alpha"))
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool):
        raise ConfigError(f"lora_alpha={alpha!r} of a LoRA adapter is not a number")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _check_pairs(
    folder: str | Path, pairs: dict[str, _Pair], banks: dict[str, ExpertBank], expert: int
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


def _write(bank: ExpertBank, expert: int, pair: _Pair) -> None:
    start, rank = sum(bank.size.all_ranks[:expert]), pair.a.shape[0]
    a, b = bank.factor("lora_A").weight, bank.factor("lora_B").weight
    with torch.no_grad():
        a[start : start + rank].copy_(pair.a)
        own = b[:, start : start + bank.size.all_ranks[expert]]
        own.zero_()
        own[:, :rank].copy_(pair.b.to(own) * (pair.scale / bank.size.scale))
