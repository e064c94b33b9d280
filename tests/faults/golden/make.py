"""Writes the adapters of one release, their base, and what they compute: run once per format.

    PYTHONPATH=. python tests/faults/golden/make.py tests/faults/golden/format_1

What is written is never written again: `test_golden.py` loads it for ever.
"""

import sys
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from moeadapt import MoeLoraConfig

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
}
COMMON = {
    "task_type": "CAUSAL_LM",
    "r": 2,
    "lora_alpha": 4,
    "num_experts": 3,
    "target_modules": "all-linear",
    "init_lora_weights": False,
}
ADAPTERS = {
    "linear": {"router": {"name": "top_k", "k": 2, "init_std": 0.5}, "n_shared": 1},
    "ffn": {"placement": "ffn", "router": {"name": "soft"}},
}


def base() -> PreTrainedModel:
    """Build the base, its weights random."""
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def main(folder: Path) -> None:
    """Write everything below `folder`, which must not exist."""
    folder.mkdir()
    torch.manual_seed(0)
    model = base()
    save_file(model.state_dict(), folder / "base.safetensors")
    ids = torch.randint(0, 32, (2, 7))
    tensors = {"input_ids": ids}
    for name, fields in ADAPTERS.items():
        copy = base()
        copy.load_state_dict(model.state_dict())
        adapted = get_peft_model(copy, MoeLoraConfig(**COMMON, **fields)).eval()
        adapted.save_pretrained(folder / name)
        (folder / name / "README.md").unlink()
        with torch.no_grad():
            tensors[name] = adapted(input_ids=ids).logits
    save_file(tensors, folder / "expected.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
