"""Export and serve: write a trained mixture as a stock checkpoint, which needs no moeadapt to run.

python examples/08_export_and_serve.py [--adapter FOLDER] [--out FOLDER]   (after example 01)
"""

import argparse
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

import moeadapt

parser = argparse.ArgumentParser()
parser.add_argument("--adapter", default="outputs/examples/first_adapter")
parser.add_argument("--out", default="outputs/examples/exported", help="must not exist yet")
args = parser.parse_args()
if not Path(args.adapter).is_dir():
    parser.error(f"there is no folder {args.adapter!r}; run examples/01_first_adapter.py first")

model = AutoPeftModelForCausalLM.from_pretrained(args.adapter, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(args.adapter)

# The checkpoint is loaded and compared before this returns; where it differs, nothing is left.
receipt = moeadapt.export(
    model, args.out, engines=["transformers", "vllm", "llama.cpp"], tokenizer=tokenizer
)
print(receipt.text(), "\n")

stock = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
inputs = tokenizer("Pronounce the word: banana\n", return_tensors="pt")
for name, each in (("adapter", model), (type(stock).__name__, stock)):
    made = each.generate(**inputs, max_new_tokens=16, do_sample=False)
    text = tokenizer.decode(made[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    print(f"{name:<20} {text!r}")

print(f"""
serve it:
  vllm serve {args.out}
  python -m sglang.launch_server --model-path {args.out}
  python convert_hf_to_gguf.py {args.out} --outfile model.gguf && llama-server -m model.gguf
docs/serve.md says what each engine does with each kind of checkpoint.""")
