"""Reads a saved plain LoRA adapter: pairs of matrices beside an unchanged base, nothing else.

Letters: D in, O out, r rank.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from moeadapt.adapter_folder import WEIGHTS, read_settings
from moeadapt.adapter_format.adapter import check_values, read_numbers, to_tensors
from moeadapt.adapter_format.files import open_file
from moeadapt.adapter_format.header import read_header
from moeadapt.errors import ConfigError
from moeadapt.tuner.checks import matching
from moeadapt.tuner.config import check_patterns
from moeadapt.tuner.patterns import check_keys_end


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
    patterns = _alpha_pattern(config, folder)
    check_keys_end("alpha_pattern", patterns, tensors, str(folder))
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        key, _, factor = name.removesuffix(".weight").rpartition(".")
        if factor not in ("lora_A", "lora_B") or not name.endswith(".weight"):
            raise ConfigError(f"{folder} holds {name!r}, which is not part of a plain LoRA")
        pairs.setdefault(key.removeprefix("base_model.model."), {})[factor] = tensor
    read = {}
    for key, pair in pairs.items():
        if not _is_pair(pair):
            raise ConfigError(f"{folder}: lora_A and lora_B of {key!r} do not belong together")
        alpha = matching(patterns, key, config.get("lora_alpha"))
        scale = _scale(config, alpha, pair["lora_A"].shape[0], folder)
        read[key] = ScaledPair(a=pair["lora_A"], b=pair["lora_B"], scale=scale)
    return read


def _is_pair(pair: dict[str, Tensor]) -> bool:
    """Return whether there are two matrices of one rank, which is at least 1."""
    if len(pair) != 2 or any(factor.dim() != 2 for factor in pair.values()):  # noqa: PLR2004
        return False
    rank = pair["lora_A"].shape[0]
    return rank > 0 and pair["lora_B"].shape[1] == rank


def _files(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = read_settings(folder, "LORA")
    tensors = _tensors(folder)
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


def _tensors(folder: Path) -> dict[str, Tensor]:
    """Read the weights with the checks of our own adapters; PEFT writes no manifest."""
    path = folder / WEIGHTS
    with open_file(folder, WEIGHTS) as file:
        header = read_header(file, path)
        tensors = dict(to_tensors(read_numbers(file, header, path), header))
    check_values(tensors, path)
    return tensors


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


def _alpha_pattern(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ConfigError(f"{folder}: alpha_pattern={patterns!r} must map patterns to numbers")
    check_patterns("alpha_pattern", patterns, str(folder))
    return patterns


def _scale(config: dict[str, Any], alpha: Any, rank: int, folder: Path) -> float:
    number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
    if not number or not math.isfinite(alpha):
        raise ConfigError(f"{folder}: lora_alpha={alpha!r} of a LoRA adapter is no finite number")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
