"""Load a saved adapter and generate with it on and off.

python examples/02_load_and_generate.py [adapter folder]
"""

import sys

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

import moeadapt  # noqa: F401 - makes PEFT know the adapter

folder = sys.argv[1] if len(sys.argv) > 1 else "outputs/example"

model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("Pronounce the word: banana\n", return_tensors="pt")


def answer() -> str:
    made = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return tokenizer.decode(made[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


print("with experts:", answer())
with model.disable_adapter():
    print("base model:  ", answer())
