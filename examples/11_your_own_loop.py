"""Your own loop, with gradient accumulation: one extra line scales the aux losses.

python examples/11_your_own_loop.py [--model MODEL]
"""

import argparse

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import moeadapt
from moeadapt import MoeLoraConfig
from moeadapt.embedded import load_task, resolve_model

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="embedded:smollm2-135m", help="a folder or a hub id")
base = resolve_model(parser.parse_args().model)

tokenizer = AutoTokenizer.from_pretrained(base)
model = get_peft_model(
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
    MoeLoraConfig(
        r=4,
        num_experts=4,
        balance={"switch": 0.01, "z_loss": 0.001},
        router_scope="block",
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    ),
)
model.print_trainable_parameters()
model.train()

accumulation = 2
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
rows = load_task("pronounce", train=8, test=0).train
moeadapt.set_aux_loss_scale(model, 1 / accumulation)  # as the task loss below
for step, row in enumerate(rows, start=1):
    ids = tokenizer(f"{row['prompt']}\n{row['completion']}", return_tensors="pt").input_ids
    loss = model(input_ids=ids, labels=ids).loss / accumulation
    loss.backward()
    if step % accumulation == 0:
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step // accumulation}: loss {loss.item() * accumulation:.3f}")
