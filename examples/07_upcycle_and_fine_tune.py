"""Upcycle and fine-tune: a dense model becomes a stock mixture of whole FFNs, then gets a LoRA.

The checkpoint is an ordinary one of transformers: nothing that loads it needs moeadapt.

python examples/07_upcycle_and_fine_tune.py [--model MODEL] [--steps N] [--out FOLDER]
"""

import argparse
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import moeadapt
from moeadapt.embedded import load_task

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="embedded:smollm2-135m", help="a folder of a dense model")
parser.add_argument("--experts", type=int, default=2)
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--out", default="outputs/examples/upcycled", help="must not exist yet")
args = parser.parse_args()

# Experts that are copies compute exactly what the dense model does: the receipt says how exactly.
# They become different in training, since the router sends them different tokens.
receipt = moeadapt.upcycle(
    args.model, args.out, num_experts=args.experts, top_k=2, gate_std=0.5, engines=["transformers"]
)
print(receipt.text(), "\n")

model = AutoModelForCausalLM.from_pretrained(args.out, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(args.out)
rows = load_task("pronounce", train=32, test=0).train
# transformers keeps the experts of a layer stacked in parameters, not in linear modules.
stacks = sorted({n.split("layers.0.")[1] for n, _ in model.named_parameters() if "layers.0." in n})
inside = [name for name in stacks if "experts" in name or "gate.weight" in name]
print("LoRA on q_proj, v_proj and", ", ".join(inside))
trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    args=SFTConfig(
        output_dir=f"{args.out}-lora",
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
    peft_config=LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        target_parameters=inside,
        task_type="CAUSAL_LM",
    ),
)
trainer.model.print_trainable_parameters()
trainer.train()
trainer.save_model()
files = sorted(path.name for path in Path(args.out).iterdir())
print(f"{args.out}: {', '.join(files)}\nits LoRA: {args.out}-lora")
