"""An upcycled checkpoint goes into TRL with an ordinary LoRA, tokenizer included."""

import json
import re

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from moeadapt.export.upcycle import upcycle
from moeadapt.export.verify import load_strictly
from moeadapt.training.plan import plan_recipe
from moeadapt.training.recipe import parse_recipe
from moeadapt.training.run import run
from tests.export.bases import base
from tests.toy import sentences, toy_text, toy_tokenizer

LORAS = {
    "qwen3": {
        "target_modules": ["q_proj", "v_proj"],
        "target_parameters": [
            "mlp.experts.gate_up_proj",
            "mlp.experts.down_proj",
            "mlp.gate.weight",
        ],
    },
    "llama": {"target_modules": ["q_proj", "v_proj"], "target_parameters": ["mlp.gate.weight"]},
}


def folder_of(name, root):
    base(name).save_pretrained(root)
    toy_tokenizer().save_pretrained(root)
    return root


@pytest.mark.parametrize("name", LORAS)
def test_two_steps_of_trl_change_attention_router_and_experts(name, tmp_path):
    out = tmp_path / "moe"
    upcycle(folder_of(name, tmp_path / "base"), out, 3, 2, noise=0.1, gate_std=0.5)
    args = SFTConfig(
        output_dir=str(tmp_path / "run"), max_steps=2, learning_rate=1e-2, report_to=[],
        per_device_train_batch_size=4, use_cpu=True, bf16=False, gradient_checkpointing=False,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=load_strictly(out),
        args=args,
        train_dataset=toy_text(),
        processing_class=AutoTokenizer.from_pretrained(out),
        peft_config=LoraConfig(r=2, lora_dropout=0.0, task_type="CAUSAL_LM", **LORAS[name]),
    )
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    parts = {"q_proj": 0.0, "mlp.gate": 0.0}
    if name == "qwen3":
        parts["mlp.experts"] = 0.0
    for tensor, old in before.items():
        for part in parts:
            if part in tensor and "lora_B" in tensor:
                parts[part] = max(parts[part], float((after[tensor].detach() - old).abs().max()))
    assert min(parts.values()) > 0, parts


RECIPE = """
model_name_or_path: {base}
dataset_name: {data}
output_dir: {out}
dtype: float32
max_steps: 2
learning_rate: 0.01
per_device_train_batch_size: 4
use_cpu: true
bf16: false
gradient_checkpointing: false
report_to: none
lora:
  r: 2
  target_modules: all-linear
"""


ROUTER = r"\.(gate|router|gate\.wg)\.lora"
TRAINED = [
    "llama", "llama, attention biases", "qwen2", "qwen3", "olmo2", "granite", "ernie4_5", "cohere2",
    "hunyuan",
]  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
def test_a_recipe_with_a_plain_lora_trains_attention_router_and_experts(name, tmp_path):
    moe, out = tmp_path / "moe", tmp_path / "run"
    upcycle(folder_of(name, tmp_path / "base"), moe, 3, 2, noise=0.1, gate_std=0.5)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(8)))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(base=moe, data=data, out=out))
    parsed = parse_recipe("sft", str(recipe))
    plan = plan_recipe(parsed)
    assert plan.targets == 2 * (4 + 3)  # per layer: attention, router, and two stacks of experts
    assert plan.routers == 0
    run(parsed)
    trained = load_file(out / "adapter_model.safetensors")
    for part, count in (("q_proj", 2), (".experts.", 4), (ROUTER, 2)):
        moved = [t.abs().max() for n, t in trained.items() if re.search(part, n) and "lora_B" in n]
        assert len(moved) == count, part
        assert min(moved) > 0, part
    loaded = PeftModel.from_pretrained(load_strictly(moe), out)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), loaded.disable_adapter():
        before = loaded(input_ids=ids).logits
    assert (loaded(input_ids=ids).logits - before).abs().max() > 1e-4


def test_gates_take_texts_where_the_base_has_a_tokenizer(tmp_path):
    folder, texts = folder_of("llama", tmp_path / "base"), sentences(6)
    ids = [torch.tensor(toy_tokenizer()(text)["input_ids"]) for text in texts]
    for out, given in (("a", texts), ("b", ids)):
        upcycle(folder, tmp_path / out, 2, 1, gate_init="kmeans", gate_texts=given)
    gates = [load_strictly(tmp_path / o).model.layers[0].mlp.gate.weight for o in ("a", "b")]
    assert_close(*gates, rtol=0.0, atol=0.0)
