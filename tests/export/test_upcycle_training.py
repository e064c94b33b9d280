"""An upcycled checkpoint goes into TRL with an ordinary LoRA, tokenizer included."""

import pytest
import torch
from peft import LoraConfig
from torch.testing import assert_close
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from moeadapt.export.upcycle import upcycle
from moeadapt.export.verify import load_strictly
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


def test_gates_take_texts_where_the_base_has_a_tokenizer(tmp_path):
    folder, texts = folder_of("llama", tmp_path / "base"), sentences(6)
    ids = [torch.tensor(toy_tokenizer()(text)["input_ids"]) for text in texts]
    for out, given in (("a", texts), ("b", ids)):
        upcycle(folder, tmp_path / out, 2, 1, gate_init="kmeans", gate_texts=given)
    gates = [load_strictly(tmp_path / o).model.layers[0].mlp.gate.weight for o in ("a", "b")]
    assert_close(*gates, rtol=0.0, atol=0.0)
