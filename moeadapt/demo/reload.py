"""Loads a saved adapter in a new process and compares its logits with the recorded ones."""

import sys
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file

import moeadapt  # noqa: F401 - makes PEFT know the adapter


def main(folder: str) -> None:
    """Print the largest difference between recorded and recomputed logits."""
    probe = load_file(Path(folder) / PROBE)
    model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=probe["input_ids"]).logits
    print((logits - probe["logits"]).abs().max().item())


PROBE = "demo_probe.safetensors"
"""Input ids and logits that the training process saw."""

if __name__ == "__main__":
    main(sys.argv[1])
