"""Train, save and load an adapter with nothing but moeadapt and what it requires.

Run by the tests, and by `make test-wheel` in a clean environment. Prints what it found.
"""

import sys
import tempfile

import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import moeadapt

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def main() -> None:
    torch.manual_seed(0)
    ids = torch.arange(3, 21).reshape(2, 9)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(f"{folder}/base")
        config = moeadapt.MoeLoraConfig(
            r=4,
            num_experts=4,
            router="top_k",
            balance={"switch": 0.01},
            placement="ffn",
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(LlamaForCausalLM.from_pretrained(f"{folder}/base"), config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(3):
            losses.append(model(input_ids=ids, labels=ids).loss)
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < losses[0], losses
        model.eval().save_pretrained(f"{folder}/adapter")
        loaded = AutoPeftModelForCausalLM.from_pretrained(f"{folder}/adapter").eval()
        with torch.no_grad():
            before, after = model(input_ids=ids).logits, loaded(input_ids=ids).logits
            with loaded.disable_adapter():
                base = loaded(input_ids=ids).logits
    assert torch.equal(before, after)
    assert not torch.equal(before, base)
    print("version", moeadapt.__version__)
    print("from", moeadapt.__file__)
    print("optional", sorted({"datasets", "trl", "altair", "gguf"} & set(sys.modules)))
    print("loaded with equal logits")


if __name__ == "__main__":
    main()
