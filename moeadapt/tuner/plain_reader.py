"""Reads a saved plain LoRA adapter: pairs of matrices beside an unchanged base, nothing else.

Letters: D in, O out, r rank.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from moeadapt.adapter_folder import WEIGHTS, read_settings
from moeadapt.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ScaledPair:
    """What an adapter adds to one linear: scale * B A."""

    a: Float[Tensor, "r D"]
    b: Float[Tensor, "O r"]
    scale: float


def read_plain(folder: str | Path) -> dict[str, ScaledPair]:
    """Return what the adapter adds to each linear, by its path in the base model.

    Raises:
        ConfigError: the folder holds no LoRA adapter in safetensors, or one that is more than its
            pairs of matrices.
    """
    folder = Path(folder)
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
        read[key] = ScaledPair(a=pair["lora_A"], b=pair["lora_B"], scale=scale)
    return read


def _files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = read_settings(folder, "LORA")
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ConfigError(f"{folder / WEIGHTS} is damaged: {error}") from None
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
