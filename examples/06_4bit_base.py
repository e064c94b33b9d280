"""4-bit base: train experts beside weights that bitsandbytes keeps in four bits.

python examples/06_4bit_base.py [--model MODEL] [--steps N] [--out FOLDER]

Needs `pip install 'moeadapt[quant,train]'`. The model's widths must be multiples of 64 on a CPU.
"""

import argparse

import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig

from moeadapt import MoeLoraConfig
from moeadapt.embedded import load_task, resolve_model
from moeadapt.training import MoESFTTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="embedded:smollm2-135m", help="a folder or a hub id")
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--out", default="outputs/examples/4bit")
args = parser.parse_args()

base = resolve_model(args.model)
device = "cuda" if torch.cuda.is_available() else "cpu"
loading = {
    "quantization_config": BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
    ),
    "device_map": {"": device},
    "dtype": torch.float32,
}
model = AutoModelForCausalLM.from_pretrained(base, **loading)
tokenizer = AutoTokenizer.from_pretrained(base)
full = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).get_memory_footprint()
print(f"base: {model.get_memory_footprint() / 1e6:.1f} MB, in float32 {full / 1e6:.1f} MB")

rows = load_task("pronounce", train=32, test=0).train
trainer = MoESFTTrainer(
    model=model,
    processing_class=tokenizer,
    args=SFTConfig(
        output_dir=args.out,
        max_steps=args.steps,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        max_length=64,
        logging_steps=1,
        report_to="none",
        bf16=False,
    ),
    train_dataset=Dataset.from_list(
        [{"prompt": row["prompt"] + "\n", "completion": row["completion"]} for row in rows]
    ),
    peft_config=MoeLoraConfig(
        r=8, num_experts=4, router="top_k", target_modules="all-linear", task_type="CAUSAL_LM"
    ),
)
trainer.train()
trainer.save_model()
# TRL trains the LoRA factors beside a quantised base in bfloat16; routers stay in float32.
for part in ("lora_A", "lora_B", "router"):
    dtypes = {p.dtype for n, p in trainer.model.named_parameters() if f"moeadapt_{part}" in n}
    print(f"{part:<8}", *dtypes)
print("saved", args.out)

# The adapter has no quantised tensor: it goes on a 4-bit base or on a full one.
ids = tokenizer(rows[0]["prompt"], return_tensors="pt").input_ids.to(device)
with torch.no_grad():
    small = AutoPeftModelForCausalLM.from_pretrained(args.out, **loading)(input_ids=ids).logits
    large = AutoPeftModelForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    agree = (small.argmax(-1).cpu() == large(input_ids=ids.cpu()).logits.argmax(-1)).float().mean()
print(f"on the full base it gives the same next token at {agree.item():.0%} of the positions")
