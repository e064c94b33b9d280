"""Presets compared: published methods beside plain LoRA on the same rows, steps and learning rate.

A few steps show what each costs, not which is best: for that, train each until it stops improving,
over several seeds (docs/evidence.md).

python examples/04_presets_compared.py [--model MODEL] [--steps N] [--presets NAME ...]
"""

import argparse
import tempfile
import time

import transformers
from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from moeadapt import PRESETS, MoeLoraConfig
from moeadapt.embedded import load_task, resolve_model
from moeadapt.training import MoESFTTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="embedded:smollm2-135m", help="a folder or a hub id")
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--presets", nargs="+", default=["mixlora", "molora", "adamole"])
args = parser.parse_args()
transformers.utils.logging.disable_progress_bar()

base = resolve_model(args.model)
data = load_task("pronounce", train=64, test=16)
train, test = (
    Dataset.from_list([{"prompt": r["prompt"] + "\n", "completion": r["completion"]} for r in rows])
    for rows in (data.train, data.test)
)


def run(trainer_class: type[SFTTrainer], config: LoraConfig | MoeLoraConfig) -> list[str]:
    """Train one adapter; return its trainable parameters, seconds per step and held-out losses."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model=base,
            args=SFTConfig(
                output_dir=folder,
                max_steps=args.steps,
                per_device_train_batch_size=4,
                learning_rate=1e-3,
                max_length=64,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                bf16=False,
            ),
            train_dataset=train,
            eval_dataset=test,
            peft_config=config,
        )
        trainer.remove_callback(PrinterCallback)
        before = trainer.evaluate()["eval_loss"]
        start = time.perf_counter()
        trainer.train()
        seconds = (time.perf_counter() - start) / args.steps
        after = trainer.evaluate()["eval_loss"]
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return [f"{trainable / 1e6:.2f} M", f"{seconds:.2f} s", f"{before:.3f}", f"{after:.3f}"]


lora = LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM")
arms = {"plain LoRA, r=32": (SFTTrainer, lora)}
for name in args.presets:
    arms[name] = (MoESFTTrainer, MoeLoraConfig.preset(name, task_type="CAUSAL_LM"))
results = {name: run(*arm) for name, arm in arms.items()}
print(f"\n{'':<18}{'trainable':>11}{'a step':>10}{'before':>9}{'after':>9}   held-out loss")
for name, cells in results.items():
    print(f"{name:<18}{cells[0]:>11}{cells[1]:>10}{cells[2]:>9}{cells[3]:>9}")
for name in args.presets:
    print(f"{name}: {PRESETS[name].line}\n    {PRESETS[name].source}")
