"""A newcomer's folder: a tiny base model with a tokenizer, rows to train on and rows held out."""

import json
from pathlib import Path

from tests.tiny import tiny
from tests.toy import WORDS, toy_tokenizer

BASE = "tiny-base"
TRAIN, HELD_OUT = "rows.jsonl", "held-out.jsonl"
ADAPTER = "tiny-adapter"

RECIPE = f"""\
model_name_or_path: {BASE}
dataset_name: {TRAIN}
output_dir: out
dtype: float32
use_cpu: true
bf16: false
max_steps: 2
report_to: none
moe:
  num_experts: 4
  r: 2
  placement: ffn
  router: {{name: top_k, k: 2}}
  target_modules: [gate_proj, up_proj, down_proj]
"""


def make_world(folder: Path) -> Path:
    """Write base, tokenizer and rows into `folder` and return it."""
    tiny("llama", vocab_size=len(WORDS) + 4, max_position_embeddings=256).save_pretrained(
        folder / BASE
    )
    toy_tokenizer().save_pretrained(folder / BASE)
    for name, first in ((TRAIN, 0), (HELD_OUT, 16)):
        rows = [_row(i) for i in range(first, first + 16)]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _row(index: int) -> dict[str, str]:
    """Return a row that counts up or down from a word that no other row of its kind begins with."""
    step = 1 if index % 2 == 0 else -1
    words = [WORDS[(3 * index + step * i) % len(WORDS)] for i in range(8)]
    domain = "up" if step > 0 else "down"
    return {
        "prompt": " ".join(words[:4]),
        "completion": " " + " ".join(words[4:]),
        "domain": domain,
    }
