"""DPO: teach a mixture to prefer one answer over another, and see the margin grow.

python examples/05_dpo.py [--model MODEL] [--steps N] [--out FOLDER]
"""

import argparse

from datasets import Dataset
from trl import DPOConfig

from moeadapt import MoeLoraConfig
from moeadapt.embedded import load_task, resolve_model
from moeadapt.training import MoEDPOTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="embedded:smollm2-135m", help="a folder or a hub id")
parser.add_argument("--steps", type=int, default=6)
parser.add_argument("--out", default="outputs/examples/dpo")
args = parser.parse_args()


def preferences(rows: list[dict[str, str]]) -> Dataset:
    """Give each row the answer to the next question as its rejected answer."""
    others = rows[1:] + rows[:1]
    return Dataset.from_list(
        [
            {
                "prompt": row["prompt"] + "\n",
                "chosen": row["completion"],
                "rejected": other["completion"],
            }
            for row, other in zip(rows, others, strict=True)
        ]
    )


data = load_task("pronounce", train=64, test=16)
trainer = MoEDPOTrainer(
    # No reference model: it is the same model with its experts switched off.
    model=resolve_model(args.model),
    args=DPOConfig(
        output_dir=args.out,
        max_steps=args.steps,
        per_device_train_batch_size=4,
        learning_rate=5e-4,
        beta=0.1,
        max_length=96,
        logging_steps=1,
        report_to="none",
        bf16=False,
    ),
    train_dataset=preferences(data.train),
    eval_dataset=preferences(data.test),
    peft_config=MoeLoraConfig(
        r=8,
        lora_alpha=16,
        num_experts=4,
        router={"name": "top_k", "k": 2},
        balance={"switch": 0.01},  # joins the DPO loss once per backward
        router_scope="block",
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    ),
)
before = trainer.evaluate()
trainer.train()
after = trainer.evaluate()
trainer.save_model()
print("\nheld-out pairs             before    after")
for name in ("loss", "rewards/accuracies", "rewards/margins"):
    print(f"{name:<24}{before[f'eval_{name}']:>9.3f}{after[f'eval_{name}']:>9.3f}")
print("saved", args.out)
