"""Your first adapter: fine-tune with LoRA experts over the FFNs, save, load, and generate with it.

python examples/01_first_adapter.py [--model MODEL] [--steps N] [--out FOLDER]
"""

import argparse

import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
from trl import SFTConfig

from moeadapt import MoeLoraConfig
from moeadapt.embedded import load_task, resolve_model
from moeadapt.training import MoESFTTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="embedded:smollm2-135m", help="a folder or a hub id")
parser.add_argument("--steps", type=int, default=8)
parser.add_argument("--out", default="outputs/examples/first_adapter")
args = parser.parse_args()

rows = load_task("pronounce", train=64, test=0).train
trainer = MoESFTTrainer(
    model=resolve_model(args.model),
    args=SFTConfig(
        output_dir=args.out,
        max_steps=args.steps,
        per_device_train_batch_size=4,
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
        r=8,  # of ONE expert
        lora_alpha=16,
        num_experts=4,
        router={"name": "top_k", "k": 2},
        balance={"switch": 0.01},
        placement="ffn",
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    ),
)
trainer.train()
trainer.save_model()
print("saved", args.out)

# `import moeadapt` is all that PEFT needs to load it.
model = AutoPeftModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(args.out)
inputs = tokenizer("Pronounce the word: banana\n", return_tensors="pt")


def answer() -> str:
    made = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return tokenizer.decode(made[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


print("with experts:", answer())
with model.disable_adapter():
    print("base model:  ", answer())
