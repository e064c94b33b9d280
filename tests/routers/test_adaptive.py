"""Routers whose number of experts per token varies, against their papers' formulas."""

import pytest
import torch
from torch.testing import assert_close

from moeadapt.errors import ConfigError
from moeadapt.routers import ROUTERS
from moeadapt.routers.sparsegen import sparsegen
from tests.routers.reference import assert_routes_as, scores, shared_out, softmax, value
from tests.samples import ALL_REAL, D, E, context, hidden, make_router
from tests.structure.trace import SYNCHRONISING, names, recorded


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def counts(weights):
    """Return how many different numbers of experts the tokens use."""
    return set((weights != 0).sum(-1).tolist())


@pytest.mark.parametrize(("p", "k_max", "renorm"), [(0.9, None, True), (0.8, 2, False)])
def test_top_p_takes_the_smallest_set_that_reaches_p(p, k_max, renorm):
    router = make_router({"name": "top_p", "p": p, "k_max": k_max, "renorm": renorm})
    router.weight.data *= 0.3

    def define(x):
        probs = softmax(scores(router, x))
        chosen, total = set(), 0.0
        for i in sorted(range(E), key=lambda i: -value(probs[i])):
            if total >= p or len(chosen) == (k_max or E):
                break
            chosen.add(i)
            total += value(probs[i])
        return (
            shared_out(probs, chosen)
            if renorm
            else [v * (i in chosen) for i, v in enumerate(probs)]
        )

    assert len(counts(assert_routes_as(router, define))) > 1


def test_top_p_of_one_takes_every_expert_and_of_almost_nothing_takes_one():
    x = hidden()
    assert (make_router({"name": "top_p", "p": 1.0})(x, ALL_REAL).weights != 0).all()
    one = make_router({"name": "top_p", "p": 1e-9})(x, ALL_REAL).weights
    assert counts(one) == {1}


@pytest.mark.parametrize(("tau", "renorm"), [(0.3, True), (0.3, False), (None, True)])
def test_a_fixed_threshold_keeps_what_passes_and_the_best_one_always(tau, renorm):
    router = make_router({"name": "threshold", "tau": tau, "renorm": renorm})
    router.weight.data *= 0.3

    def define(x):
        probs = softmax(scores(router, x))
        limit = 1 / E if tau is None else tau
        chosen = {i for i in range(E) if value(probs[i]) >= limit}
        chosen |= {max(range(E), key=lambda i: value(probs[i]))}
        return (
            shared_out(probs, chosen)
            if renorm
            else [v * (i in chosen) for i, v in enumerate(probs)]
        )

    assert len(counts(assert_routes_as(router, define))) > 1


def test_a_learned_threshold_is_that_of_adamole():
    """AdaMoLE, https://arxiv.org/abs/2405.00361, eq. 5-7."""
    router = make_router({"name": "threshold", "learned": True, "tau": 0.45})
    router.weight.data *= 0.3

    def define(x):
        probs = softmax(scores(router, x))
        tau = 0.45 / (1 + (-(router.tau_weight[0] * x).sum() - router.tau_bias[0]).exp())
        above = [p - tau for p in probs]
        chosen = {i for i in range(E) if value(above[i]) > 0}
        if not chosen:
            best = max(range(E), key=lambda i: value(probs[i]))
            return shared_out(probs, {best})
        return shared_out(above, chosen)

    weights = assert_routes_as(router, define, tokens=101)
    assert len(counts(weights)) > 1


def test_a_token_that_passes_no_learned_threshold_uses_its_best_expert():
    router = make_router({"name": "threshold", "learned": True, "tau": 0.99})
    router.tau_bias.data.fill_(50.0)
    router.tau_weight.data.zero_()
    router.weight.data *= 1e-3
    routing = router(hidden(), ALL_REAL)
    assert torch.equal(routing.weights.argmax(-1), routing.probs.argmax(-1))
    assert counts(routing.weights) == {1}


def test_relu_uses_an_expert_where_its_logit_is_positive_and_may_use_none():
    """ReMoE, https://arxiv.org/abs/2412.14711, eq. 5."""
    router = make_router("relu")
    weights = assert_routes_as(
        router, lambda x: [v if v > 0 else v * 0 for v in scores(router, x)], tokens=101
    )
    assert 0 in counts(weights)
    assert not router.sums_to_one


# --- sparsegen


def by_bisection(logits, spread):
    """Solve sum_e max(0, l_e - tau) / spread = 1 for tau, and return the weights."""
    low, high = float(logits.min()) - spread - 1, float(logits.max())
    for _ in range(200):
        tau = (low + high) / 2
        if (logits - tau).clamp(min=0).sum() / spread > 1:
            low = tau
        else:
            high = tau
    return (logits - tau).clamp(min=0) / spread


@pytest.mark.parametrize("spread", [0.002, 0.2, 1.0, 3.0, 50.0])
@pytest.mark.parametrize("num_experts", [1, 2, 5, 17])
def test_sparsegen_solves_its_optimisation_problem(spread, num_experts):
    logits = torch.randn(31, num_experts, dtype=torch.float64)
    spreads = torch.full((31, 1), spread, dtype=torch.float64)
    found = sparsegen(logits, spreads)
    for row, weights in zip(logits, found, strict=True):
        assert_close(weights, by_bisection(row, spread), atol=1e-9, rtol=1e-9)
    assert_close(found.sum(-1), torch.ones(31, dtype=torch.float64))


def test_sparsegen_has_the_gradient_of_its_definition():
    """Inside one support the weights are differentiable; so gradcheck holds away from its edges."""
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    spread = (0.5 + torch.rand(6, 1, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(sparsegen, (logits, spread))


def test_ties_share_alike_in_sparsegen():
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0]], dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    third = torch.tensor([[0.0, 1 / 3, 1 / 3, 1 / 3]], dtype=torch.float64)
    assert_close(sparsegen(logits, one), third)


def test_a_larger_spread_uses_more_experts():
    x, used = hidden(101), []
    for spread in (0.01, 0.5, 5.0):
        router = make_router({"name": "sparsegen"})
        router.spread_weight.data.zero_()
        router.spread_bias.data.fill_(torch.tensor(spread).expm1().log())
        torch.manual_seed(1)
        torch.nn.init.normal_(router.weight, std=0.3)
        used.append((router(x, context(101)).weights != 0).sum())
    assert used[0] < used[1] < used[2]


def test_the_spread_starts_where_it_was_set():
    router = ROUTERS.parse({"name": "sparsegen", "spread": 0.7}).build(D, E)
    spread = 0.001 + torch.nn.functional.softplus(router.spread_bias)
    assert_close(spread, torch.tensor([0.7]))


# --- dynamic


def dynamic_definition(router, training):
    def define(x):
        unit = x / x.square().sum().sqrt()
        cosines = [(unit * row).sum() / row.square().sum().sqrt() for row in router.weight]
        margins = [
            1 / (1 + (-c).exp()) - 1 / (1 + (-t).exp())
            for c, t in zip(cosines, router.threshold, strict=True)
        ]
        alive = [i for i in range(E) if router.alive[i]]
        chosen = {i for i in alive if value(margins[i]) > 0}
        if not chosen and not training:
            chosen = {max(alive, key=lambda i: value(cosines[i]))}
        count = max(len(chosen), 1)
        return [
            (1 + m - m.detach()) / count if i in chosen else m * 0 for i, m in enumerate(margins)
        ]

    return define


@pytest.mark.parametrize("training", [True, False])
def test_dynamic_is_the_top_any_gating_of_dynmoe(training):
    """DynMoE, https://arxiv.org/abs/2405.14297, eq. 4-6."""
    router = make_router({"name": "dynamic", "start": 3}).train(training)
    router.threshold.data.mul_(0.3)
    weights = assert_routes_as(router, dynamic_definition(router, training), tokens=101)
    assert not weights[:, 3].any()
    assert (0 in counts(weights)) == training
    assert len(counts(weights)) > 2


def step(router, x, steps=1):
    """Run `x` through the router and tell it so, as an optimizer step would."""
    for _ in range(steps):
        routing = router(x, context(len(x)))
        uses = (routing.weights != 0).double().sum(0)
        router.after_step(torch.tensor(float(len(x))), uses, router.record(routing, x))


def test_dynamic_drops_an_expert_that_nobody_used():
    router = make_router({"name": "dynamic", "every": 2})
    router.threshold.data[:] = torch.tensor([-9.0, 9.0, -9.0, -9.0])
    step(router, hidden(50))
    assert router.alive.all()
    step(router, hidden(50))
    assert router.alive.tolist() == [True, False, True, True]
    assert not router.seen_uses.any()
    assert router.seen_steps == 0


def test_dynamic_adds_an_expert_towards_the_tokens_that_nobody_took():
    router = make_router({"name": "dynamic", "every": 1, "start": 2})
    router.threshold.data[:] = torch.tensor([9.0, -9.0, 3.0, 3.0])
    router.threshold.data[1] = 9.0
    x = hidden(50) * 0.1 + hidden(1)
    step(router, x)
    assert router.alive[0], "the last expert stays"
    new = int(router.alive.nonzero()[-1])
    assert router.threshold[new] == 0
    direction = torch.nn.functional.normalize(x, dim=-1).sum(0)
    cosine = torch.nn.functional.cosine_similarity(router.weight[new], direction, dim=0)
    assert_close(cosine, torch.ones_like(cosine))
    assert (router(x, context(50)).weights[:, new] != 0).all()


def test_dynamic_never_changes_without_being_asked():
    router = make_router("dynamic")
    step(router, hidden(50), steps=3)
    assert router.alive.all()
    assert not router.seen_uses.any()


def test_padding_does_not_ask_for_an_expert():
    router = make_router({"name": "dynamic", "every": 5})
    router.threshold.data.fill_(9.0)
    x = hidden()
    nothing = router(x, context(7, torch.zeros(7, dtype=torch.bool)))
    assert not router.record(nothing, x).any()
    assert router.record(router(x, context(7)), x).any()


def test_a_step_without_tokens_is_none():
    """Another adapter was trained, or every label was masked."""
    router = make_router({"name": "dynamic", "every": 1, "start": 3})
    router.alive[0] = False
    for _ in range(3):
        router.after_step(torch.zeros(()), torch.zeros(E), torch.zeros(D))
    assert router.alive.tolist() == [False, True, True, False]
    router.after_step(torch.ones(()), torch.zeros(E), torch.zeros(D))
    assert router.alive.tolist() == [False, True, False, False], "one that was alive stays"


def test_following_a_step_never_waits_for_the_device():
    router = make_router({"name": "dynamic", "every": 1})
    with recorded() as kernels:
        router.after_step(torch.ones(()), torch.rand(E), torch.rand(D))
    assert not set(names(kernels)) & SYNCHRONISING


def test_a_frozen_gate_that_would_be_changed_is_refused():
    with pytest.raises(ConfigError, match="every=2 changes the gate, and freeze=True forbids it"):
        ROUTERS.parse({"name": "dynamic", "every": 2, "freeze": True}).build(D, E)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "dynamic", "start": 5}, "start=5 is larger than num_experts=4"),
        ({"name": "top_p", "k_max": 5}, "k_max=5 is larger than num_experts=4"),
        ({"name": "expert_choice", "k": 4.5}, "k=4.5 is larger than num_experts=4"),
        ({"name": "rank_wise", "k": 5}, "k=5 is larger than num_experts=4"),
        ({"name": "hierarchical", "groups": 3}, "groups=3 does not divide num_experts=4"),
        ({"name": "hierarchical", "k": 3}, "k=3 is larger than 2"),
        ({"name": "hierarchical", "k_groups": 3}, "k_groups=3 is larger than 2"),
    ],
)
def test_settings_that_do_not_fit_the_number_of_experts_are_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        ROUTERS.parse(spec).build(D, E)


def test_sparsemax_is_the_nearest_point_of_the_simplex():
    """Martins and Astudillo 2016, https://arxiv.org/abs/1602.02068, eq. 1: no point is nearer."""
    router = make_router("sparsemax")
    routing = router(hidden(31), context(31))
    distance = (routing.weights - routing.logits).square().sum(-1)
    others = torch.rand(31, 2000, E, dtype=torch.float64).pow(3)
    others = others / others.sum(-1, keepdim=True)
    assert ((others - routing.logits[:, None]).square().sum(-1) >= distance[:, None]).all()
    assert len(counts(routing.weights)) > 1
