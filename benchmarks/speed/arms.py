"""The models that are compared: one small Llama (or a real checkpoint) with each adapter.

Letters: T tokens, N experts, r rank of one, K experts per token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.speed.case import Sizes
from benchmarks.speed.loops import mirrored
from moeadapt import MoeLoraConfig

ALL = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
VOCABULARY = 1024
MIXTURES: dict[str, dict[str, Any]] = {
    "ours_layer": {"router_scope": "layer"},
    "ours_block": {"router_scope": "block"},
    "ours_ffn": {"placement": "ffn"},
    "ours_layer_no_losses": {"router_scope": "layer", "balance": None},
    "ours_block_no_losses": {"router_scope": "block", "balance": None},
}
"""Ours with the default balance loss and counts, and without: the loops have none."""

LOOPS = {"loop_layer": "ours_layer", "published_ffn": "ours_ffn"}
"""Loop -> the adapter of ours that it computes."""


@dataclass(frozen=True)
class Shape:
    """A Llama: width D, width of the FFN, layers."""

    width: int
    ffn: int
    layers: int
    heads: int = 8
    kv_heads: int = 8


def random_llama(shape: Shape, sizes: Sizes) -> Any:
    """Return a Llama with random weights, the same ones each time."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.width,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=16384,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(sizes.device):
        return LlamaForCausalLM(config).to(sizes.dtype)


def mixture_config(name: str, sizes: Sizes, **overrides: Any) -> MoeLoraConfig:
    """Return the settings of one of `MIXTURES`."""
    fields: dict[str, Any] = {
        "r": sizes.rank,
        "lora_alpha": 2 * sizes.rank,
        "num_experts": sizes.experts,
        "router": {"name": "top_k", "k": sizes.k},
        **MIXTURES[name],
        **ALL,
    }
    return MoeLoraConfig(**{**fields, **overrides})


def make_arms(load: Callable[[], Any], sizes: Sizes, only: list[str] | None = None) -> Any:
    """Return every arm on its own copy of the base, by name.

    Args:
        load: returns a fresh base, the same one each time.
        sizes: experts, rank and k; the rest is not read.
        only: the arms to make; None: all.
    """

    def adapted(config: Any) -> Any:
        return get_peft_model(load(), config, autocast_adapter_dtype=False)

    def lora(rank: int) -> LoraConfig:
        return LoraConfig(r=rank, lora_alpha=2 * rank, **ALL)

    makers: dict[str, Callable[[], Any]] = {
        "base": lambda: load().requires_grad_(False),
        "lora_r": lambda: adapted(lora(sizes.rank)),
        "lora_kr": lambda: adapted(lora(sizes.k * sizes.rank)),
        "lora_Nr": lambda: adapted(lora(sizes.experts * sizes.rank)),
    }
    for name in MIXTURES:
        makers[name] = lambda name=name: adapted(mixture_config(name, sizes))
    for loop, name in LOOPS.items():
        makers[loop] = lambda name=name: mirrored(load(), adapted(mixture_config(name, sizes)))
    return {name: makers[name]() for name in (only or makers)}
