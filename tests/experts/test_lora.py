"""LoRA experts: one expert is PEFT's LoRA, and where each expert's numbers lie."""

import math

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from torch import nn
from torch.testing import assert_close

from moeadapt.dispatch import dispatch
from moeadapt.experts import BankSize
from moeadapt.experts.lora import LoraBank
from tests.samples import OUT, D, E, R, T, hidden, make_bank


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("routed", [False, True])
def test_one_expert_is_pefts_lora_in_value_and_every_gradient(routed):
    base = nn.Linear(D, OUT).double()
    alpha = 5
    config = LoraConfig(r=R, lora_alpha=alpha, init_lora_weights=False)
    theirs = PeftLinear(base, "default", config=config, r=R, lora_alpha=alpha).double()
    size = BankSize(in_features=D, out_features=OUT, num_experts=1, rank=R, scale=alpha / R)
    factors = LoraBank.make_factors(size, "random")
    ours = LoraBank(size, {k: nn.ModuleDict({"default": f.double()}) for k, f in factors.items()})
    pairs = [(ours.factor(n).weight, getattr(theirs, n)["default"].weight) for n in factors]
    for mine, other in pairs:
        assert mine.shape == other.shape
        mine.data.copy_(other.data)
    x = hidden().requires_grad_()
    upstream = hidden(T, OUT)
    expected = theirs(x)
    weights = torch.ones(T, 1, dtype=torch.float64) if routed else None
    found = dispatch(x, weights, ours, base(x))
    assert_close(found, expected)
    mine = torch.autograd.grad(found, [x, *(a for a, _ in pairs)], upstream)
    other = torch.autograd.grad(expected, [x, *(b for _, b in pairs)], upstream)
    for a, b in zip(mine, other, strict=True):
        assert b.any()
        assert_close(a, b)
    assert_close(ours.delta_weight(0), theirs.get_delta_weight("default"))


def test_equal_weights_are_pefts_lora_of_the_total_rank():
    bank, x = make_bank("lora"), hidden()
    a, b = (bank.factor(name).weight for name in bank.factor_names)
    dense = x @ (bank.size.scale * (b @ a)).T
    ones = torch.ones(T, E, dtype=torch.float64)
    assert_close(dispatch(x, ones, bank, torch.zeros(T, OUT).double()), dense)


def test_an_expert_owns_consecutive_ranks():
    bank = make_bank("lora", num_shared=1)
    assert bank.factor("lora_A").weight.shape == ((E + 1) * R, D)
    assert bank.factor("lora_B").weight.shape == (OUT, (E + 1) * R)
    before = [bank.delta_weight(e).clone() for e in range(E + 1)]
    bank.factor("lora_A").weight.data[2 * R : 3 * R] += 1
    changed = [not torch.equal(bank.delta_weight(e), before[e]) for e in range(E + 1)]
    assert changed == [False, False, True, False, False]


def test_the_scale_multiplies_every_expert():
    torch.manual_seed(1)
    bank = make_bank("lora")
    doubled = LoraBank(
        BankSize(in_features=D, out_features=OUT, num_experts=E, rank=R, scale=2 * bank.size.scale),
        {n: nn.ModuleDict({"default": bank.factor(n)}) for n in bank.factor_names},
    )
    x, weights, zero = hidden(), torch.rand(T, E).double(), torch.zeros(T, OUT).double()
    assert_close(dispatch(x, weights, doubled, zero), 2 * dispatch(x, weights, bank, zero))
    assert_close(dispatch(x, None, doubled, zero), 2 * dispatch(x, None, bank, zero))


@pytest.mark.parametrize("init", ["zero_b", "gaussian", "random"])
def test_factors_start_as_documented(init):
    size = BankSize(in_features=1009, out_features=503, num_experts=5, rank=4)
    a, b = LoraBank.make_factors(size, init).values()
    bound = 1 / math.sqrt(1009)
    if init == "gaussian":
        assert_close(float(a.weight.detach().std()), 1 / 4, rtol=0.05, atol=0)
    else:
        assert a.weight.abs().max() <= bound
        assert_close(float(a.weight.detach().std()), bound / math.sqrt(3), rtol=0.05, atol=0)
    assert bool(b.weight.any()) == (init == "random")


def test_a_bank_looks_its_factors_up_at_each_use():
    """Wrappers such as FSDP replace leaf modules after the bank was made."""
    dicts = {
        n: nn.ModuleDict({"default": make_bank("lora").factor(n)}) for n in LoraBank.factor_names
    }
    bank = LoraBank(make_bank("lora").size, dicts)
    x = hidden()
    before = bank.apply_one(x, 0)
    dicts["lora_B"]["default"] = make_bank("lora").factor("lora_B")
    assert not torch.equal(bank.apply_one(x, 0), before)
