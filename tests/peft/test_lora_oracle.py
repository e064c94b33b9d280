"""One expert that is always on is PEFT's own LoRA: same weights, same outputs, same gradients."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch.testing import assert_close

from tests.tiny import LORA_KINDS, adapt, batch, gradients, logits, moe_config, tiny

MODELS = ["llama", "gpt2", "opt"]

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "alpha_1": {"lora_alpha": 1},
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {r".*\.0\..*": 6, "o_proj": 2}},
    "alpha_pattern": {"alpha_pattern": {r"(q_proj|c_fc|fc1)": 3, r".*\.1\..*": 20}},
    "both_rslora": {
        "use_rslora": True,
        "rank_pattern": {r".*\.1\..*": 2},
        "alpha_pattern": {r".*\.0\..*": 5},
    },
}


def _lora(name: str, **fields: Any) -> PeftModel:
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        **{"lora_alpha": 8, "target_modules": "all-linear", **fields},
        fan_in_fan_out=name == "gpt2",
    )
    return adapt(tiny(name), config).double()


def _one_expert(name: str, kind: str, lora: PeftModel, **fields: Any) -> PeftModel:
    """Return our adapter with one expert and give both models the same random weights."""
    config = moe_config(kind, num_experts=1, router="uniform", **fields)
    ours = adapt(tiny(name), config).double()
    theirs = dict(lora.named_parameters())
    with torch.no_grad():
        for parameter_name, parameter in ours.named_parameters():
            if "moeadapt_" in parameter_name:
                theirs[parameter_name.replace("moeadapt_", "")].copy_(parameter)
    return ours


# A pattern may name modules that only some of the models have.
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("setting", sorted(SETTINGS))
@pytest.mark.parametrize("kind", LORA_KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_one_expert_is_plain_lora(name: str, kind: str, setting: str) -> None:
    lora = _lora(name, **SETTINGS[setting])
    ours = _one_expert(name, kind, lora, **SETTINGS[setting])
    assert_close(logits(ours, batch()), logits(lora, batch()))
    mine, theirs = gradients(ours, batch()), gradients(lora, batch())
    assert {n.replace("moeadapt_", "") for n in mine} == set(theirs)
    for name_of in mine:
        assert_close(mine[name_of], theirs[name_of.replace("moeadapt_", "")])


@pytest.mark.parametrize("kind", LORA_KINDS)
def test_dropout_draws_what_lora_draws(kind: str) -> None:
    lora = _lora("llama", lora_dropout=0.5).train()
    ours = _one_expert("llama", kind, lora, lora_dropout=0.5).train()
    found = []
    for model in (ours, lora):
        torch.manual_seed(0)
        found.append(logits(model, batch()))
    assert_close(found[0], found[1])
    without = logits(ours.eval(), batch())
    assert not torch.allclose(found[0], without, atol=1e-2)
    assert_close(without, logits(lora.eval(), batch()))


@pytest.mark.parametrize("kind", LORA_KINDS)
def test_equal_experts_under_any_router_are_plain_lora(kind: str) -> None:
    lora = _lora("llama")
    ours = adapt(tiny("llama"), moe_config(kind)).double()
    theirs = dict(lora.named_parameters())
    single = {n: p for n, p in ours.named_parameters() if "moeadapt_lora" in n}
    with torch.no_grad():
        for parameter_name, parameter in single.items():
            small = theirs[parameter_name.replace("moeadapt_", "")]
            small.normal_(std=0.3)
            copies = [parameter.shape[i] // small.shape[i] for i in (0, 1)]
            parameter.copy_(small.repeat(*copies))
    assert_close(logits(ours, batch()), logits(lora, batch()))


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_initialisation_follows_loras(init: bool | str) -> None:
    config = moe_config("layer", init_lora_weights=init, r=16, num_experts=8)
    ours = dict(adapt(tiny("llama"), config).named_parameters())
    theirs = dict(_lora("llama", init_lora_weights=init).named_parameters())
    expected = 1 / 4 if init == "gaussian" else (1 / 32 / 3) ** 0.5
    for name, parameter in ours.items():
        if "lora_B" in name:
            assert not parameter.any()
            assert not theirs[name.replace("moeadapt_", "")].any()
        if "lora_A" in name and "down_proj" not in name:
            scale = {True: 1, "gaussian": 4 / 16}[init]
            assert_close(parameter.std().item(), expected * scale, rtol=0.1, atol=0)
            their_std = theirs[name.replace("moeadapt_", "")].std().item()
            assert_close(their_std, expected, rtol=0.25, atol=0)
