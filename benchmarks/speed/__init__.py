"""Speed and memory of mixtures of LoRA experts beside plain LoRA and the other implementations."""
