"""L1 sparsity: its two norms, the balanced form, and the coefficient that holds a target."""

import math

import pytest
import torch
from torch.testing import assert_close

from moeadapt.balance import parse_balance
from moeadapt.balance.l1_sparsity import L1SparsityConfig
from moeadapt.errors import ConfigError
from moeadapt.routers import ROUTERS
from tests.samples import ALL_REAL, D, E, T, collapsed, make_router, mixture_of, routing_of

TOP_K, RELU = mixture_of(), mixture_of("relu")
MASK = torch.arange(T) % 3 > 0


def loss(routing, mixture, **fields):
    return L1SparsityConfig(**fields).loss(routing, mixture)


def relu_routing(logits, mask=None):
    return routing_of(logits, logits.relu(), E, mask)


def one_each(num_experts, weight=1.0):
    """Token t uses expert t alone, with this weight."""
    unit = torch.eye(num_experts, dtype=torch.float64)
    return routing_of(1e3 * unit, weight * unit, num_experts)


def all_first(num_experts, weight=1.0):
    weights = torch.zeros(T, num_experts, dtype=torch.float64)
    weights[:, 0] = weight
    return routing_of(1e3 * weights, weights, num_experts)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("num_experts", [4, 7])
def test_of_probabilities_it_is_one_when_sure_and_the_root_of_e_when_undecided(num_experts):
    logits = torch.zeros(T, num_experts, dtype=torch.float64)
    assert_close(float(loss(one_each(num_experts), TOP_K)), 1.0)
    assert_close(float(loss(collapsed(1, num_experts, logit=1e3), TOP_K)), 1.0)
    found = loss(routing_of(logits, logits.softmax(-1), num_experts), TOP_K)
    assert_close(float(found), math.sqrt(num_experts))


@pytest.mark.parametrize("num_experts", [4, 7])
@pytest.mark.parametrize("mixture", [TOP_K, RELU], ids=["probs", "weights"])
def test_the_balanced_form_is_e_times_larger_at_collapse(num_experts, mixture):
    plain = [float(loss(r(num_experts), mixture)) for r in (one_each, all_first)]
    assert_close(plain, [1.0, 1.0])
    found = [float(loss(r(num_experts), mixture, balanced=True)) for r in (one_each, all_first)]
    assert_close(found, [1.0, float(num_experts)])


def test_of_relu_weights_it_is_their_sum_and_use_counts_relative_to_the_target():
    assert_close(float(loss(one_each(E, 2.5), RELU)), 2.5)
    assert_close(float(loss(all_first(E, 2.5), RELU)), 2.5)
    found = loss(one_each(E, 2.5), RELU, balanced=True, target=1 / E)
    assert_close(float(found), 2.5)
    assert_close(float(loss(all_first(E, 2.5), RELU, balanced=True, target=0.5)), 2.5 / 0.5)


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_the_balanced_form_is_the_one_of_remoe(mask):
    """1/T sum_t sum_e f_e R(x_t)_e with f_e = E/(kT) sum_t 1[R(x_t)_e > 0]."""
    weights = torch.randn(T, E, dtype=torch.float64)
    rows = (weights.relu() if mask is None else weights.relu()[mask]).tolist()
    k, count = 2, len(rows)
    use = [E / (k * count) * sum(row[e] > 0 for row in rows) for e in range(E)]
    expected = sum(use[e] * row[e] for row in rows for e in range(E)) / count
    assert_close(
        float(loss(relu_routing(weights, mask), RELU, balanced=True, target=k / E)), expected
    )


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("mixture", [TOP_K, RELU], ids=["probs", "weights"])
def test_its_gradient_is_that_of_its_value(mask, balanced, mixture):
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: loss(relu_routing(x, mask), mixture, balanced=balanced), logits
    )


def test_without_a_target_the_coefficient_is_fixed():
    router, config = make_router("relu"), L1SparsityConfig(coef=0.5)
    config.check(router)
    config.prepare(router)
    config.after_step(router, torch.tensor(7.0), torch.ones(E))
    assert config.coefficient(router) == 0.5
    assert not config.acts_after_step
    assert "sparsity_coef" not in router.state_dict()


def adaptive(**fields):
    router = ROUTERS.parse("relu").build(D, E)
    config = L1SparsityConfig(target=0.25, **fields)
    config.check(router)
    config.prepare(router)
    return router, config


def test_the_coefficient_follows_the_rule_of_remoe():
    router, config = adaptive(coef=1e-3)
    assert config.acts_after_step
    tokens = torch.tensor(8.0)  # 8 tokens, 4 experts, a target of 0.25: 8 uses wanted
    for uses, expected in (
        ([8.0, 1.0, 0.0, 0.0], 1.2e-3),
        ([8.0, 8.0, 8.0, 8.0], 1.44e-3),
        ([8.0, 0.0, 0.0, 0.0], 1.44e-3),
        ([2.0, 2.0, 2.0, 2.0], 1.44e-3),
        ([1.0, 2.0, 2.0, 2.0], 1.2e-3),
        ([0.0, 0.0, 0.0, 0.0], 1e-3),
    ):
        config.after_step(router, tokens, torch.tensor(uses))
        assert_close(config.coefficient(router), torch.tensor(expected))


def test_a_step_without_tokens_keeps_the_coefficient():
    router, config = adaptive(coef=1e-3)
    config.after_step(router, torch.tensor(0.0), torch.zeros(E))
    assert torch.equal(config.coefficient(router), torch.tensor(1e-3))


@pytest.mark.parametrize("used", [0.0, 1.0])
def test_the_coefficient_stays_finite_and_positive_where_the_target_is_out_of_reach(used):
    router, config = adaptive(alpha=1e3)
    for _ in range(50):
        config.after_step(router, torch.tensor(1.0), torch.full((E,), used))
    coef = config.coefficient(router)
    assert torch.isfinite(coef)
    assert coef > 0


def test_the_coefficient_is_saved_and_stays_float32():
    router, config = adaptive(coef=1e-8)
    router.to(torch.bfloat16)
    assert_close(router.state_dict()["sparsity_coef"], torch.tensor(1e-8))
    config.after_step(router, torch.tensor(1.0), torch.ones(E))
    other, _ = adaptive()
    other.load_state_dict(router.state_dict())
    assert_close(config.coefficient(other), torch.tensor(1.2e-8))


@pytest.mark.parametrize("start", [-1.0, 3.0], ids=["too_few", "too_many"])
def test_a_closed_loop_ends_at_the_target(start):
    """The task asks for larger weights, the loss for smaller ones."""
    config = L1SparsityConfig(coef=1e-3, target=0.25, alpha=1.05)
    router = make_router("relu")
    config.prepare(router)
    logits = (start + torch.randn(61, E, dtype=torch.float64)).requires_grad_()
    wish = 0.2 * torch.randn_like(logits)
    shares = []
    for _ in range(1500):
        routing = relu_routing(logits)
        task = (logits - 0.5 - wish).square().sum() / len(logits)
        total = task + config.coefficient(router) * config.loss(routing, RELU)
        (slope,) = torch.autograd.grad(total, logits)
        logits.data -= 2.0 * slope
        uses = (routing.weights != 0).double().sum(0)
        config.after_step(router, torch.tensor(61.0), uses)
        shares.append(float(uses.sum()) / (61 * E))
        assert torch.isfinite(config.coefficient(router))
    assert abs(shares[0] - 0.25) > 0.1
    assert abs(sum(shares[-500:]) / 500 - 0.25) < 0.05


@pytest.mark.parametrize("router", ["relu", "sparsegen", "threshold", "top_p"])
def test_a_target_works_where_the_number_of_experts_varies(router):
    L1SparsityConfig(target=0.5).check(make_router(router))


@pytest.mark.parametrize("router", ["top_k", "uniform", "soft", "sigmoid", "expert_choice"])
def test_a_target_is_refused_where_it_does_not(router):
    with pytest.raises(ConfigError, match=r"'l1_sparsity': target=0.5 .*relu, sparsegen"):
        L1SparsityConfig(target=0.5).check(make_router(router))
    L1SparsityConfig().check(make_router(router))


def test_a_target_needs_a_coefficient_to_start_from():
    (config,) = parse_balance({"l1_sparsity": {"coef": 0, "target": 0.5}}).values()
    with pytest.raises(ConfigError, match="coef must be > 0"):
        config.check(make_router("relu"))


def test_all_inactive_tokens_keep_a_finite_gradient():
    logits = torch.full((T, E), -1.0, requires_grad=True)
    value = loss(relu_routing(logits), RELU, balanced=True)
    assert value == 0
    assert torch.isfinite(torch.autograd.grad(value, logits)[0]).all()
    assert torch.isfinite(make_router("relu")(torch.zeros(T, D).double(), ALL_REAL).weights).all()
