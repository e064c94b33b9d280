"""A folder in which the documents' Python runs: what they name is there, tiny and random.

The blocks run as they are written. `Qwen/Qwen3-0.6B` and `my-adapter` are folders of the working
directory, which transformers and PEFT prefer to a hub; names that a page takes for granted, as
`rows` in the README, are put into its namespace.
"""

from pathlib import Path
from typing import Any

import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from tests.tiny import adapt, moe_config, saved_base, tiny
from tests.toy import toy_tokenizer


def build(folder: Path) -> None:
    """Put a base model, an adapter and a plain LoRA into `folder`."""
    save_with_tokenizer(tiny("qwen3"), folder / "Qwen/Qwen3-0.6B")
    base = saved_base("llama", folder)
    mixture = transformers.AutoModelForCausalLM.from_pretrained(base)
    save_with_tokenizer(adapt(mixture, moe_config("ffn")), folder / "my-adapter")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    plain = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    save_with_tokenizer(get_peft_model(model, plain), folder / "my-plain-lora")


def save_with_tokenizer(model: Any, folder: Path) -> None:
    """Save `model` and the toy tokenizer into one folder."""
    model.save_pretrained(folder)
    toy_tokenizer().save_pretrained(folder)


def names_of(page: str) -> dict[str, Any]:
    """Return the names that `page` takes for granted."""
    if page == "README.md":
        return {"rows": Dataset.from_list([{"prompt": "w1 w2", "completion": " w3"}] * 2)}
    if page == "docs/index.md":
        return {"model": tiny("llama")}
    return {}
