"""Push: publish an adapter with its card in one commit, after everything has been checked.

python examples/09_push.py [--adapter FOLDER] [--repo you/name] [--send]   (after example 01)

Without --send nothing leaves this machine, and no account is needed.
"""

import argparse
from pathlib import Path

import moeadapt

parser = argparse.ArgumentParser()
parser.add_argument("--adapter", default="outputs/examples/first_adapter")
parser.add_argument("--repo", default="you/first-adapter", help="owner/name on the hub")
parser.add_argument("--base", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="id on the hub")
parser.add_argument("--send", action="store_true", help="really publish, as a private repository")
args = parser.parse_args()
if not Path(args.adapter).is_dir():
    parser.error(f"there is no folder {args.adapter!r}; run examples/01_first_adapter.py first")

result = moeadapt.push(
    args.adapter,
    args.repo,
    base_model=args.base,  # the adapter was trained from a folder, which means nothing elsewhere
    license="apache-2.0",
    private=True,
    with_static_lora=True,  # a plain LoRA beside it, for who has no moeadapt
    dry_run=not args.send,
)

print("the card:\n")
print(result.card)
print("files:")
for name, size in result.files.items():
    print(f"{size:>12,} bytes  {name}")
for name, reason in result.left_out.items():
    print(f"        left out  {name}: {reason}")
if result.commit is None:
    print(f"\nnothing was sent; with --send it goes to {args.repo}")
else:
    print("\nsent:", result.url)
    print("PeftModel.from_pretrained(base, ...) of the mixture:", repr(args.repo))
    print("without moeadapt:", f"{args.repo!r}, subfolder='static-lora'")
