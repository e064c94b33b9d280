"""Compose from trained LoRAs: each expert starts as a LoRA adapter, then a router is trained.

python examples/10_compose_from_loras.py [--model MODEL] [--steps N] [--out FOLDER]
"""

import argparse

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import moeadapt
from moeadapt import MoeLoraConfig
from moeadapt.embedded import load_task, resolve_model

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="embedded:smollm2-135m", help="a folder or a hub id")
parser.add_argument("--steps", type=int, default=12)
parser.add_argument("--out", default="outputs/examples/composed")
args = parser.parse_args()

base = resolve_model(args.model)
tokenizer = AutoTokenizer.from_pretrained(base)
tasks = ["pronounce", "math_word"]
data = {task: load_task(task, train=args.steps, test=8) for task in tasks}
targets = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def load() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def loss(model: torch.nn.Module, row: dict[str, str]) -> torch.Tensor:
    text = f"{row['prompt']}\n{row['completion']}"
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=128).input_ids
    return model(input_ids=ids, labels=ids).loss


def train(model: torch.nn.Module, rows: list[dict[str, str]], lr: float) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for row in rows:
        loss(model, row).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def show(name: str, model: torch.nn.Module) -> None:
    with torch.no_grad():
        means = [torch.stack([loss(model, r) for r in data[t].test]).mean() for t in tasks]
    print(f"{name:<28}" + "".join(f"{mean.item():>12.3f}" for mean in means))


print(f"{'held-out loss':<28}" + "".join(f"{task:>12}" for task in tasks))
show("base model", load().eval())
for rank, task in zip((4, 8), tasks, strict=True):  # ranks and scales may differ
    lora = get_peft_model(load(), LoraConfig(r=rank, lora_alpha=16, **targets))
    train(lora, data[task].train, lr=1e-3)
    show(f"LoRA for {task}", lora)
    lora.save_pretrained(f"{args.out}-{task}")

mixture = get_peft_model(load(), MoeLoraConfig(r=8, num_experts=2, router="soft", **targets)).eval()
moeadapt.init_from_adapters(mixture, [f"{args.out}-{task}" for task in tasks])
for expert in range(len(tasks)):
    with moeadapt.override_routing(mixture, force=expert):
        show(f"mixture, only expert {expert}", mixture)
show("mixture, untrained router", mixture)
for name, parameter in mixture.named_parameters():  # the experts are trained already
    parameter.requires_grad = "moeadapt_router" in name
pairs = zip(*(data[task].train for task in tasks), strict=True)
train(mixture, [row for pair in pairs for row in pair], lr=1e-2)
show("mixture, trained router", mixture)
mixture.save_pretrained(args.out)
show("the same, loaded", PeftModel.from_pretrained(load(), args.out).eval())
