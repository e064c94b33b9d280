"""Ask a model which experts its tokens use.

python examples/03_look_at_routing.py [adapter folder]
"""

import sys

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

import moeadapt
from moeadapt import stats

folder = sys.argv[1] if len(sys.argv) > 1 else "outputs/example"

model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("Pronounce the word: banana\n", return_tensors="pt")

with torch.no_grad(), moeadapt.collect_routing(model) as routings:
    model(**inputs)

for layer, (routing,) in routings.items():
    shares = " ".join(f"{share:.2f}" for share in stats.load(routing).tolist())
    active = stats.active(routing).mean().item()
    print(f"{layer:<32} load {shares}   experts per token {active:.2f}")
