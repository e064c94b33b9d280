"""Cases 58, 62, 63 and 67: a mixture where something simpler says what it has to be."""

from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch.testing import assert_close

import moeadapt
from moeadapt.tuner.inspect import pop_router_stats
from tests.tiny import (
    KINDS,
    LORA_KINDS,
    VOCAB,
    adapt,
    adapted,
    batch,
    gradients,
    logits,
    moe_config,
    positions,
    tiny,
)

kinds = pytest.mark.parametrize("kind", KINDS)


def padded(side: str) -> dict[str, Tensor]:
    """Return the same three rows, padded on one side."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.zeros(3, 9, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate((9, 6, 2)):
        place = slice(0, length) if side == "right" else slice(9 - length, 9)
        ids[row, place] = torch.randint(3, VOCAB, (length,), generator=generator)
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}


@kinds
def test_fault_058_the_side_of_the_padding_changes_no_real_token(kind: str) -> None:
    model = adapted("llama", kind)
    found = {}
    for side in ("left", "right"):
        inputs = padded(side)
        found[side] = logits(model, inputs)[inputs["attention_mask"].bool()]
    assert_close(found["left"], found["right"], atol=1e-5, rtol=1e-5)


@kinds
def test_fault_058_padding_is_not_in_the_load(kind: str) -> None:
    counted = []
    for side in ("left", "right"):
        model = adapted("llama", kind, balance={"switch": 0.5}).train()
        moeadapt.set_aux_loss_scale(model, 1.0)
        gradients(model, padded(side))
        counted.append(pop_router_stats(model))
    assert {stats.tokens for stats in counted[0].values()} == {17.0}
    for name, stats in counted[0].items():
        assert_close(stats.load, counted[1][name].load)
        assert stats.losses == pytest.approx(counted[1][name].losses, rel=1e-5)


@pytest.mark.parametrize("router", [{"name": "top_k", "k": 1}, "soft", "uniform"])
@pytest.mark.parametrize("kind", LORA_KINDS)
def test_fault_062_one_expert_is_plain_lora(kind: str, router: Any) -> None:
    config = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    lora = adapt(tiny("llama"), LoraConfig(r=4, lora_alpha=8, **config))
    balance = {"balance": None}
    ours = adapt(tiny("llama"), moe_config(kind, num_experts=1, router=router, **balance))
    theirs = dict(lora.named_parameters())
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "moeadapt_lora" in name:
                theirs[name.replace("moeadapt_", "")].copy_(parameter)
    assert_close(logits(ours, batch()), logits(lora, batch()), atol=1e-5, rtol=1e-5)
    mine, plain = gradients(ours, batch()), gradients(lora, batch())
    for name, value in plain.items():
        ours_of = mine[name.replace("lora_", "moeadapt_lora_")]
        assert_close(ours_of, value, atol=1e-5, rtol=1e-4)


@kinds
def test_fault_062_every_expert_chosen_is_the_dense_soft_mixture(kind: str) -> None:
    every = adapted("llama", kind, router={"name": "top_k", "k": 4, "init_std": 0.5})
    dense = adapted("llama", kind, router={"name": "soft", "init_std": 0.5})
    state = every.state_dict()
    assert dense.state_dict().keys() == state.keys()
    dense.load_state_dict(state)
    assert_close(logits(every, batch()), logits(dense, batch()), atol=1e-5, rtol=1e-5)
    few = adapted("llama", kind, router={"name": "top_k", "k": 1, "init_std": 0.5})
    few.load_state_dict(state)
    assert not torch.allclose(logits(few, batch()), logits(dense, batch()), atol=1e-3)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fault_063_a_fresh_adapter_is_bitwise_the_base(kind: str, dtype: torch.dtype) -> None:
    base = tiny("llama").to(dtype)
    expected = logits(base, batch())
    model = adapt(base, moe_config(kind, init_lora_weights=True))
    for mode in (model.eval(), model.train()):
        assert torch.equal(logits(mode, batch()), expected)


NEW = 6


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """Return the new tokens of every row."""
    fixed = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(**inputs, max_new_tokens=NEW, **fixed, **options)[:, -NEW:]


@kinds
def test_fault_067_cache_beams_and_left_padding_generate_the_same_tokens(kind: str) -> None:
    model, inputs = adapted("llama", kind), batch()
    cached = generate(model, inputs)
    assert torch.equal(generate(model, inputs, use_cache=False), cached)
    beams = generate(model, inputs, num_beams=3)
    assert torch.equal(generate(model, inputs, num_beams=3, use_cache=False), beams)
    for row, mask in enumerate(inputs["attention_mask"]):
        ids = inputs["input_ids"][row, mask.bool()][None]
        alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(generate(model, alone)[0], cached[row])
        assert torch.equal(generate(model, alone, num_beams=3)[0], beams[row])
