"""Tiny random models in memory: two layers, hidden width 32, a vocabulary of 128 tokens.

Every parameter, biases and norms included, is random and large enough that a wrong sign, a missing
bias or a skipped expert shows in the output.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from moeadapt import MoeLoraConfig

VOCAB = 128
HIDDEN = 32
TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODERN = {
    **TOKENS,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


def _modern(kind: str, **fields: Any) -> Any:
    return getattr(transformers, f"{kind}Config")(**{**MODERN, **fields})


def _gpt2() -> Any:
    sizes = {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 64}
    silent = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2Config(**TOKENS, **sizes, **silent, initializer_range=0.2)


def _opt() -> Any:
    sizes = {"hidden_size": HIDDEN, "word_embed_proj_dim": HIDDEN, "ffn_dim": 64}
    return transformers.OPTConfig(
        **TOKENS,
        **sizes,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        dropout=0.0,
        init_std=0.2,
    )


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: _modern("Llama"),
    "qwen3": lambda: _modern("Qwen3"),
    "mistral": lambda: _modern("Mistral", sliding_window=6),
    "gpt2": _gpt2,
    "opt": _opt,
    "gemma": lambda: _modern("Gemma"),
}
"""Name -> its configuration; tied embeddings in gpt2, opt and gemma, biases in gpt2 and opt."""

LORA_KINDS = ("layer", "block", "ffn")
"""A router per linear, a routing per block, experts that span the FFN."""

KINDS = (*LORA_KINDS, "glu")
"""The same, and small FFNs beside the FFN."""

# The FFNs of qwen3 and mistral are those of llama, and small FFNs see nothing else.
CASES = [
    (name, kind)
    for name in MODELS
    for kind in KINDS
    if kind != "glu" or name not in ("qwen3", "mistral")
]


def tiny(name: str, seed: int = 0, auto: Any = None, **config_fields: Any) -> PreTrainedModel:
    """Build the model `name`, the same one for the same seed.

    Args:
        name: one of `MODELS`.
        seed: of the random weights; the global generator is left alone.
        auto: the auto class, `AutoModelForCausalLM` if None.
        config_fields: set on the model's configuration.
    """
    config = MODELS[name]()
    for field, value in config_fields.items():
        setattr(config, field, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (auto or transformers.AutoModelForCausalLM).from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def saved_base(name: str, tmp_path: Path, seed: int = 0) -> str:
    """Save `tiny(name, seed)` and return its folder."""
    folder = tmp_path / f"{name}-{seed}"
    if not folder.exists():
        tiny(name, seed).save_pretrained(folder)
    return str(folder)


def moe_config(kind: str, **overrides: Any) -> MoeLoraConfig:
    """Return an adapter config of one of `KINDS`, with no zero factor unless overridden."""
    fields: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "num_experts": 4,
        "router": {"name": "top_k", "k": 2, "init_std": 0.5},
        "balance": None,
        "target_modules": "all-linear",
        "experts": {"name": "glu", "dim": 6, "scale": 1.5} if kind == "glu" else "lora",
        "placement": kind if kind in ("ffn", "glu") else "linear",
        "router_scope": "block" if kind == "block" else "layer",
        "init_lora_weights": False,
    }
    return MoeLoraConfig(**{**fields, **overrides})


def adapted(name: str, kind: str, seed: int = 0, **overrides: Any) -> PeftModel:
    """Return `tiny(name)` with a random adapter of `kind`, in eval mode."""
    return adapt(tiny(name), moe_config(kind, **overrides), seed=seed)


def adapt(base: PreTrainedModel, config: Any, seed: int = 0) -> PeftModel:
    """Wrap `base`, with an adapter that is the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(base, config).eval()


def batch(rows: int = 3, length: int = 9, seed: int = 0) -> dict[str, Tensor]:
    """Return token ids and their attention mask; row i starts with 2 * i padding tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : 2 * row] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def labels_of(inputs: dict[str, Tensor]) -> Tensor:
    """Return the token ids as labels, padding left out."""
    return inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)


def positions(mask: Tensor) -> Tensor:
    """Return position ids that start at each row's first real token."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def logits(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Run `model` without grad and return its logits."""
    with torch.no_grad():
        return model(**inputs).logits


def gradients(model: torch.nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Back-propagate the language-model loss once; return every gradient by parameter name."""
    model.zero_grad()
    model(**inputs, labels=labels_of(inputs)).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
