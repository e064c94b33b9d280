"""Contrastive experts, against the sum over every pair of features in use."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from moeadapt.balance import BALANCE, Mixture
from moeadapt.balance.contrastive import ContrastiveConfig, info_nce
from moeadapt.errors import ConfigError
from tests.samples import D, E, R, T, hidden, make_bank, make_router, mixture_of, routing_of

MASK = torch.arange(T) % 3 > 0


def loss(mixture, routing, **fields):
    return ContrastiveConfig(**fields).loss(routing, mixture)


def routing_by(experts, mask=None, num_experts=E):
    """Token t uses the experts `experts[t]` equally."""
    weights = torch.zeros(len(experts), num_experts, dtype=torch.float64)
    for t, row in enumerate(experts):
        weights[t, list(row)] = 1 / max(len(row), 1)
    return routing_of(torch.zeros_like(weights), weights, 2, mask)


SOME = [(0, 1), (1, 2), (0,), (), (2, 1), (1, 3), (0, 2)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def by_pairs(mixture, routing, tokens, temperature):
    """Return the loss from its definition: a loop over anchors, positives and all others."""
    weight = mixture.banks[0].factor("lora_A").weight
    items = []
    for t in tokens:
        for e in range(E):
            if routing.weights[t, e] != 0:
                feature = weight[e * R : (e + 1) * R] @ mixture.hidden[t]
                items.append((e, feature / feature.norm()))
    terms = []
    for i, (e, z) in enumerate(items):
        scores = [(f, (z @ y) / temperature) for j, (f, y) in enumerate(items) if j != i]
        total = torch.stack([s.exp() for _, s in scores]).sum().log()
        own = [total - s for f, s in scores if f == e]
        if own:
            terms.append(torch.stack(own).mean())
    return torch.stack(terms).mean()


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("num_shared", [0, 2])
def test_its_value_and_gradient_are_those_of_the_sum_over_pairs(mask, num_shared):
    bank, x = make_bank("lora", num_shared=num_shared), hidden().requires_grad_()
    mixture = Mixture(router=make_router("top_k"), banks=[bank], hidden=x)
    routing = routing_by(SOME, mask)
    tokens = range(T) if mask is None else mask.nonzero().flatten().tolist()
    found = loss(mixture, routing, temperature=0.5)
    expected = by_pairs(mixture, routing, tokens, 0.5)
    assert_close(found, expected)
    leaves = [x, bank.factor("lora_A").weight]
    expected_grads = torch.autograd.grad(expected, leaves)
    assert expected_grads[1].any()
    assert_close(torch.autograd.grad(found, leaves), expected_grads)


@pytest.mark.parametrize("cosine", [1.0, 0.0, -1.0])
def test_it_is_what_its_file_says_for_equal_and_for_different_experts(cosine):
    """Four items in two experts: one positive and two negatives each."""
    labels = torch.tensor([0, 0, 1, 1])
    same = labels[:, None] == labels
    scores = torch.where(same, 1.0, cosine).double() / 0.5
    found = info_nce(scores, labels, torch.ones(4, dtype=torch.bool))
    assert_close(float(found), math.log(1 + 2 * math.exp((cosine - 1) / 0.5)))


def test_at_a_collapse_onto_one_expert_it_is_the_log_of_the_others():
    mixture = mixture_of()
    mixture = replace(mixture, hidden=mixture.hidden[:1].expand(T, -1))
    assert_close(float(loss(mixture, routing_by([(0,)] * T)).detach()), math.log(T - 1))


def test_equal_experts_on_equal_tokens_cost_the_log_of_all_others():
    bank = make_bank("lora")
    bank.factor("lora_A").weight.data = torch.randn(R, D, dtype=torch.float64).repeat(E, 1)
    x = hidden()[:1].expand(E * 2, -1)
    mixture = Mixture(router=make_router("top_k"), banks=[bank], hidden=x)
    found = loss(mixture, routing_by([(t % E,) for t in range(2 * E)]))
    assert_close(float(found.detach()), math.log(2 * E - 1))


@pytest.mark.parametrize("masked", [False, True])
def test_a_sample_is_spread_evenly_over_the_real_tokens(masked):
    tokens, samples = 61, 8
    mask = torch.arange(tokens) >= 20 if masked else None
    real = list(range(20, tokens)) if masked else list(range(tokens))
    chosen = [real[i * len(real) // samples] for i in range(samples)]
    experts = [(t % E, (t + 1) % E) for t in range(tokens)]
    mixture = replace(mixture_of(), hidden=hidden(tokens))
    routing = routing_by(experts, mask)
    found = loss(mixture, routing, samples=samples, temperature=0.5)
    assert_close(found, by_pairs(mixture, routing, chosen, 0.5))


def test_fewer_real_tokens_than_samples_are_each_taken_once():
    mask = torch.zeros(61, dtype=torch.bool)
    mask[[3, 17, 40]] = True
    mixture = replace(mixture_of(), hidden=hidden(61))
    routing = routing_by([(0, 1)] * 61, mask)
    found = loss(mixture, routing, samples=8, temperature=0.5)
    assert_close(found, by_pairs(mixture, routing, [3, 17, 40], 0.5))


@pytest.mark.parametrize("case", ["padding", "unused", "alone"])
def test_without_two_features_of_one_expert_it_is_zero_and_finite(case):
    mask = torch.zeros(T, dtype=torch.bool) if case == "padding" else None
    experts = {"padding": SOME, "unused": [()] * T, "alone": [(0,), (1,)] + [()] * (T - 2)}[case]
    bank, x = make_bank("lora"), hidden()
    if mask is not None:
        x[:] = torch.nan
    mixture = Mixture(router=make_router("top_k"), banks=[bank], hidden=x.requires_grad_())
    value = loss(mixture, routing_by(experts, mask))
    assert value == 0
    for gradient in torch.autograd.grad(value, [x, bank.factor("lora_A").weight]):
        assert not gradient.any()


def test_it_has_a_gradient_while_b_is_zero():
    bank = make_bank("lora", init="zero_b")
    value = loss(replace(mixture_of(), banks=[bank]), routing_by(SOME))
    assert torch.autograd.grad(value, bank.factor("lora_A").weight)[0].any()


@pytest.mark.parametrize("expert", ["ia3", "random_a", "shared_a"])
def test_experts_without_a_trained_a_of_their_own_are_refused(expert):
    with pytest.raises(ConfigError, match="'contrastive'.*lora_A,.*Bank .*experts='lora'"):
        BALANCE["contrastive"]().check_experts(make_bank(expert))


def test_experts_of_different_ranks_are_refused():
    bank = make_bank("lora")
    bank.costs = lambda: (1.0, 0.5, 1.0, 1.0)
    with pytest.raises(ConfigError, match="'contrastive'.* a LoraBank .*different ranks"):
        BALANCE["contrastive"]().check_experts(bank)
