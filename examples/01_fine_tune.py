"""Fine-tune a model with LoRA experts over its FFNs, and save the adapter.

python examples/01_fine_tune.py [base model] [output folder]
"""

import sys

from datasets import Dataset
from trl import SFTConfig

from moeadapt import MoeLoraConfig
from moeadapt.embedded import load_task, resolve_model
from moeadapt.training import MoESFTTrainer

base = resolve_model(sys.argv[1] if len(sys.argv) > 1 else "embedded:smollm2-135m")
out = sys.argv[2] if len(sys.argv) > 2 else "outputs/example"

rows = load_task("pronounce", train=64, test=0).train
trainer = MoESFTTrainer(
    model=base,
    args=SFTConfig(
        output_dir=out,
        max_steps=4,
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
        r=8,
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
print("saved", out)
