"""Orthogonal experts, against every pair of matrices and every pair of outputs."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from moeadapt.balance import BALANCE, Mixture
from moeadapt.balance.orthogonal import OrthogonalConfig
from moeadapt.errors import ConfigError
from tests.samples import D, E, R, T, hidden, make_bank, make_router, mixture_of, routing_of

MASK = torch.arange(T) % 3 > 0


def loss(mixture, routing=None, form="A"):
    return OrthogonalConfig(form=form).loss(routing or some_routing(), mixture)


def some_routing(mask=None, k=2):
    logits = torch.randn(T, E, dtype=torch.float64)
    weights = torch.zeros_like(logits)
    weights.scatter_(1, logits.topk(k).indices, 0.5)
    return routing_of(logits, weights, k, mask)


def mixture_with(a, b=None, in_features=D, num_shared=0, x=None):
    bank = make_bank("lora", in_features, num_shared=num_shared)
    bank.factor("lora_A").weight.data = a
    if b is not None:
        bank.factor("lora_B").weight.data = b
    x = hidden(T, in_features) if x is None else x
    return Mixture(router=make_router("top_k", in_features), banks=[bank], hidden=x)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_of_a_it_is_zero_for_orthogonal_experts_and_counts_pairs_of_equal_ones():
    unit = torch.eye(E * R, 2 * D, dtype=torch.float64)
    assert loss(mixture_with(unit, in_features=2 * D)) == 0
    same = torch.eye(R, D, dtype=torch.float64).repeat(E, 1)
    assert_close(float(loss(mixture_with(same)).detach()), R * E * (E - 1) / 2)


def test_directions_inside_one_expert_do_not_count():
    a = torch.zeros(E * R, D, dtype=torch.float64)
    a[:R, 0] = 3.0
    assert loss(mixture_with(a)) == 0


@pytest.mark.parametrize("num_shared", [0, 2])
def test_of_a_it_is_the_sum_over_pairs_and_banks_of_routed_experts(num_shared):
    banks = [make_bank("lora", dim, num_shared=num_shared) for dim in (D, 5)]
    mixture = replace(mixture_of(), banks=banks)
    expected = 0.0
    for bank in banks:
        weight = bank.factor("lora_A").weight
        parts = [weight[e * R : (e + 1) * R] for e in range(E)]
        for i in range(E):
            for j in range(i + 1, E):
                expected = expected + torch.linalg.matrix_norm(parts[i] @ parts[j].T) ** 2
    found = loss(mixture)
    assert_close(found, expected)
    leaves = [bank.factor("lora_A").weight for bank in banks]
    expected_grads = torch.autograd.grad(expected, leaves)
    assert expected_grads[0].any()
    assert_close(torch.autograd.grad(found, leaves), expected_grads)


def test_of_a_it_has_a_gradient_while_b_is_zero():
    bank = make_bank("lora", init="zero_b")
    value = loss(replace(mixture_of(), banks=[bank]))
    assert torch.autograd.grad(value, bank.factor("lora_A").weight)[0].any()


def pairwise_cosines(mixture, routing):
    """Return the squared cosine of each pair of outputs in use, from the outputs themselves."""
    bank, values = mixture.banks[0], []
    for t in range(T):
        if routing.token_mask is not None and not routing.token_mask[t]:
            continue
        used = [e for e in range(E) if routing.weights[t, e] != 0]
        outputs = {e: bank.apply_one(mixture.hidden[t : t + 1], e)[0] for e in used}
        for n, i in enumerate(used):
            for j in used[n + 1 :]:
                dot = outputs[i] @ outputs[j]
                values.append(dot**2 / (outputs[i].norm() * outputs[j].norm()) ** 2)
    return torch.stack(values)


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize(("expert", "num_shared"), [("lora", 0), ("lora", 2), ("random_a", 0)])
def test_of_outputs_it_is_the_mean_squared_cosine_of_pairs_in_use(mask, k, expert, num_shared):
    bank = make_bank(expert, num_shared=num_shared)
    x = hidden().requires_grad_()
    mixture = Mixture(router=make_router("top_k"), banks=[bank], hidden=x)
    routing = some_routing(mask, k)
    found, expected = loss(mixture, routing, "outputs"), pairwise_cosines(mixture, routing).mean()
    assert_close(found, expected)
    leaves = [x, *(bank.factor(name).weight for name in bank.factor_names)]
    assert_close(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves))


def test_of_outputs_it_is_one_for_parallel_and_zero_for_orthogonal_outputs():
    routing = some_routing()
    a = torch.randn(R, D, dtype=torch.float64).repeat(E, 1)
    b = torch.randn(5, R, dtype=torch.float64).repeat(1, E)
    assert_close(float(loss(mixture_with(a, b), routing, "outputs").detach()), 1.0)
    apart = torch.eye(E * R, dtype=torch.float64)
    assert loss(mixture_with(torch.randn(E * R, D).double(), apart), routing, "outputs") == 0


def test_of_outputs_a_zero_b_gives_zero_and_no_gradient():
    bank = make_bank("lora", init="zero_b")
    value = loss(replace(mixture_of(), banks=[bank]), form="outputs")
    assert value == 0
    for gradient in torch.autograd.grad(value, [bank.factor(n).weight for n in bank.factor_names]):
        assert not gradient.any()


def test_of_outputs_the_size_of_the_hidden_states_does_not_matter():
    routing, mixture = some_routing(), mixture_of()
    large = replace(mixture, hidden=1e12 * mixture.hidden)
    assert_close(loss(large, routing, "outputs"), loss(mixture, routing, "outputs"))


def test_of_outputs_padding_reaches_neither_value_nor_gradient():
    x = hidden()
    x[~MASK] = torch.nan
    bank = make_bank("lora")
    mixture = Mixture(router=make_router("top_k"), banks=[bank], hidden=x.requires_grad_())
    value = loss(mixture, some_routing(MASK), "outputs")
    gradients = torch.autograd.grad(value, [x, bank.factor("lora_A").weight])
    assert value > 0
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert not gradients[0][~MASK].any()


@pytest.mark.parametrize("k", [1, 2])
def test_of_outputs_tokens_without_a_pair_cost_nothing(k):
    mask = torch.zeros(T, dtype=torch.bool) if k > 1 else None
    assert loss(mixture_of(), some_routing(mask, k), "outputs") == 0


@pytest.mark.parametrize("expert", ["ia3", "random_a", "shared_a"])
def test_experts_without_a_trained_a_of_their_own_are_refused(expert):
    with pytest.raises(ConfigError, match="'orthogonal'.*lora_A,.*Bank .*experts='lora'"):
        BALANCE["orthogonal"]().check_experts(make_bank(expert))


def test_experts_of_different_ranks_are_refused():
    bank = make_bank("lora")
    bank.costs = lambda: (1.0, 0.5, 1.0, 1.0)
    with pytest.raises(ConfigError, match="'orthogonal'.* a LoraBank .*different ranks"):
        BALANCE["orthogonal"]().check_experts(bank)
