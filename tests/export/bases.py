"""Tiny random dense models of every type that has a mixture class."""

import functools
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from tests.tiny import HIDDEN, MODERN, VOCAB

FFN = 64
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
YARN["original_max_position_embeddings"] = 16
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.5, 2.0, 3.0],
    "long_factor": [2.0, 4.0, 6.0, 8.0],
    "original_max_position_embeddings": 16,
}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.2,
}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

BASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("Llama", {}, "mixtral"),
    "llama, tied, llama3 rope": (
        "Llama",
        {"tie_word_embeddings": True, "rope_parameters": LLAMA3},
        "mixtral",
    ),
    "llama, wide heads": ("Llama", {"head_dim": 12}, "mixtral"),
    "llama, attention biases": ("Llama", {"attention_bias": True}, "granite_moe"),
    "mistral, window": ("Mistral", {"sliding_window": 6}, "mixtral"),
    "phi3": ("Phi3", {"head_dim": None}, "mixtral"),
    "phi3, longrope": ("Phi3", {"head_dim": None, "rope_parameters": LONG}, "mixtral"),
    "qwen2": ("Qwen2", {"head_dim": None}, "qwen2_moe"),
    "qwen2, tied, yarn": (
        "Qwen2",
        {"head_dim": None, "tie_word_embeddings": True, "rope_parameters": YARN},
        "qwen2_moe",
    ),
    "qwen2, window in one layer": (
        "Qwen2",
        {"head_dim": None, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        "qwen2_moe",
    ),
    "qwen3": ("Qwen3", {"head_dim": 12}, "qwen3_moe"),
    "qwen3, attention biases": ("Qwen3", {"attention_bias": True}, "qwen3_moe"),
    "qwen3_5": ("Qwen3_5Text", {**LINEAR, "head_dim": 16}, "qwen3_5_moe"),
    "olmo2": ("Olmo2", {"head_dim": None}, "flex_olmo"),
    "granite": ("Granite", {"head_dim": None, **MULTIPLIERS}, "granite_moe"),
    "ernie4_5": ("Ernie4_5", {}, "ernie4_5_moe"),
    "ernie4_5, wide heads": ("Ernie4_5", {"head_dim": 12}, "ernie4_5_moe"),
    "cohere2": (
        "Cohere2",
        {
            "head_dim": None,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
            "logit_scale": 1.0,
        },
        "cohere2_moe",
    ),
    "hunyuan": ("HunYuanDenseV1", {}, "hunyuan_moe_v1"),
    "lfm2": (
        "Lfm2",
        {
            "head_dim": None,
            "layer_types": ["conv", "full_attention"],
            "block_auto_adjust_ff_dim": False,
        },
        "lfm2_moe",
    ),
    "lfm2, derived width": (
        "Lfm2",
        {
            "head_dim": None,
            "layer_types": ["conv", "full_attention"],
            "block_multiple_of": 16,
        },
        "lfm2_moe",
    ),
}
"""What it is -> its class, fields of its configuration, and the target that `auto` takes."""

ADDITIVE = {
    "llama": ("granite_moe_shared", "glm4_moe"),
    "phi3": ("granite_moe_shared", "glm4_moe"),
    "qwen2": ("qwen2_moe", "glm4_moe"),
    "qwen3": ("glm4_moe",),
    "qwen3_5": ("qwen3_5_moe",),
    "granite": ("granite_moe_shared",),
    "ernie4_5": ("ernie4_5_moe",),
    "cohere2": ("cohere2_moe",),
}
"""Bases -> the targets that hold small experts beside their FFN."""


def base_config(name: str, **overrides: Any) -> Any:
    """Return the configuration of `BASES[name]`."""
    kind, fields, _ = BASES[name]
    fields = {k: v for k, v in {**MODERN, **fields, **overrides}.items() if v is not None}
    return getattr(transformers, f"{kind}Config")(**fields)


def base(name: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Build `BASES[name]` with random norms and biases, the same one for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(base_config(name, **overrides))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@functools.cache
def _saved(name: str, seed: int, root: Path) -> Path:
    folder = root / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}"
    base(name, seed).save_pretrained(folder)
    return folder


def saved(name: str, root: Path, seed: int = 0) -> Path:
    """Save `base(name, seed)` once below `root` and return its folder."""
    return _saved(name, seed, root)


def token_ids(rows: int = 2, length: int = 24, seed: int = 1) -> torch.Tensor:
    """Return random tokens, long enough for every window and rope of `BASES` to matter."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (rows, length), generator=generator)


__all__ = ["ADDITIVE", "BASES", "FFN", "HIDDEN", "base", "base_config", "saved", "token_ids"]
