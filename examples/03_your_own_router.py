"""Your own router: a rule in your file that weighs the experts, trained and loaded again.

The names of `moeadapt.ROUTERS` are fixed, so that a saved adapter never names code to import. A
rule of your own replaces the weights of a named router while a model runs; give it again when the
adapter is loaded. A router with a name is one file and one line in moeadapt: see CONTRIBUTING.md.

python examples/03_your_own_router.py [--model MODEL] [--steps N] [--out FOLDER]
"""

import argparse

import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import moeadapt
from moeadapt import MoeLoraConfig, Routing, stats
from moeadapt.embedded import load_task, resolve_model

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="embedded:smollm2-135m", help="a folder or a hub id")
parser.add_argument("--steps", type=int, default=8)
parser.add_argument("--out", default="outputs/examples/your_own_router")
args = parser.parse_args()


def above_average(layer: str, routing: Routing) -> Tensor:
    """Keep every expert whose probability is at least 1/E; the kept ones share by probability."""
    # Rounding may put the largest of E equal probabilities a hair below 1/E.
    largest = routing.probs.detach().amax(-1, keepdim=True)
    kept = routing.probs.detach() >= largest.clamp(max=1 / routing.num_experts)
    weights = routing.probs * kept
    return weights / weights.sum(-1, keepdim=True)


base = resolve_model(args.model)
tokenizer = AutoTokenizer.from_pretrained(base)
model = get_peft_model(
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
    MoeLoraConfig(
        r=4,
        num_experts=4,
        router={"name": "soft", "init_std": 0.2},  # its gate and softmax feed the rule
        balance={"switch": 0.01},
        router_scope="block",
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    ),
)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
rows = load_task("pronounce", train=args.steps, test=0).train
model.train()
for step, row in enumerate(rows, start=1):
    ids = tokenizer(f"{row['prompt']}\n{row['completion']}", return_tensors="pt").input_ids
    with moeadapt.override_routing(model, edit=above_average), moeadapt.collect_routing(model) as r:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    active = torch.cat([stats.active(routing) for found in r.values() for routing in found]).mean()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}, experts per token {active.item():.2f}")

model.eval().save_pretrained(args.out)
loaded = AutoPeftModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
with torch.no_grad():
    with moeadapt.override_routing(model, edit=above_average):
        before = model(input_ids=ids).logits
    with moeadapt.override_routing(loaded, edit=above_average):
        after = loaded(input_ids=ids).logits
    named = loaded(input_ids=ids).logits
print("loaded, with the rule: largest logit difference", (before - after).abs().max().item())
print("loaded, without it:    largest logit difference", (before - named).abs().max().item())
