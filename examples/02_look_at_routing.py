"""Look at routing: which experts each layer and each token uses, and whether that choice matters.

python examples/02_look_at_routing.py [--adapter FOLDER]   (a folder that example 01 wrote)
"""

import argparse
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

import moeadapt
from moeadapt import stats
from moeadapt.embedded import load_task

parser = argparse.ArgumentParser()
parser.add_argument("--adapter", default="outputs/examples/first_adapter")
args = parser.parse_args()
if not Path(args.adapter).is_dir():
    parser.error(f"there is no folder {args.adapter!r}; run examples/01_first_adapter.py first")

model = AutoPeftModelForCausalLM.from_pretrained(args.adapter, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(args.adapter)
rows = load_task("pronounce", train=0, test=4).test
texts = [f"{row['prompt']}\n{row['completion']}" for row in rows]

with torch.no_grad(), moeadapt.collect_routing(model) as routings:
    for text in texts:
        model(**tokenizer(text, return_tensors="pt"))

print("share of the used slots that each expert gets, over", len(texts), "held-out texts")
for layer, found in routings.items():
    shares = torch.stack([stats.load(routing) for routing in found]).mean(0)
    active = torch.cat([stats.active(routing) for routing in found]).mean().item()
    bars = " ".join(f"{share:.2f}" for share in shares.tolist())
    print(f"{layer:<32} load {bars}   experts per token {active:.2f}")

layer, found = list(routings.items())[-1]
ids = tokenizer(texts[0]).input_ids
print(f"\nthe tokens of one text, as {layer} routes them (expert x weight)")
for token, experts, weights in zip(ids, *(part.tolist() for part in found[0].slots()), strict=True):
    used = ", ".join(f"{e} x {w:.2f}" for e, w in zip(experts, weights, strict=True) if w)
    print(f"{tokenizer.decode([token])!r:<16} {used}")


def loss() -> float:
    with torch.no_grad():
        batches = [tokenizer(text, return_tensors="pt") for text in texts]
        losses = [model(**batch, labels=batch["input_ids"]).loss for batch in batches]
    return torch.stack(losses).mean().item()


print(f"\nmean loss of these texts\nrouted as learned   {loss():.4f}")
for router in ("uniform", "random", "shuffled"):
    with moeadapt.override_routing(model, router=router):
        print(f"{router:<19} {loss():.4f}")
with moeadapt.override_routing(model, ban=0):
    print(f"{'without expert 0':<19} {loss():.4f}")
print(
    "\nIf uniform is as good, the router has learned nothing yet. The whole picture, as one page:"
)
print(f"moeadapt report {args.adapter} --data rows.jsonl --out report.html")
