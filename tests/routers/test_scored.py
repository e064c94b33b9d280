"""Routers with a fixed number of experts per token, against their papers' formulas."""

import pytest
import torch
from torch.testing import assert_close

from moeadapt import stats
from moeadapt.errors import ConfigError
from moeadapt.routers import ROUTERS
from tests.routers.reference import assert_routes_as, largest, scores, shared_out, softmax
from tests.samples import ALL_REAL, D, E, T, context, hidden, make_router


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def sigmoid(values):
    """Return the definition of a sigmoid."""
    return [1 / (1 + (-v).exp()) for v in values]


def only(values, chosen):
    """Zero what is not chosen."""
    return [v if i in chosen else v * 0 for i, v in enumerate(values)]


def test_switch_is_the_most_probable_expert_weighted_by_its_probability():
    """Switch, https://arxiv.org/abs/2101.03961, eq. 1-2."""
    router = make_router("switch")

    def define(x):
        probs = softmax(scores(router, x))
        return only(probs, largest(probs, 1))

    assert_routes_as(router, define)


def test_switch_has_one_expert_and_keeps_its_probability():
    for field in ({"k": 2}, {"normalize": "renorm"}):
        with pytest.raises(ConfigError, match="router 'switch'"):
            ROUTERS.parse({"name": "switch", **field})


def test_soft_is_a_softmax_over_all_experts():
    router = make_router("soft")
    assert_routes_as(router, lambda x: softmax(scores(router, x)))


@pytest.mark.parametrize(("renorm", "scale"), [(True, 1.0), (True, 2.5), (False, 1.0)])
@pytest.mark.parametrize("biased", [False, True])
def test_sigmoid_routes_as_deepseek_v3(renorm, scale, biased):
    """DeepSeek-V3, https://arxiv.org/abs/2412.19437, eq. 12-16."""
    router = make_router({"name": "sigmoid", "renorm": renorm, "scale": scale})
    bias = torch.zeros(E)
    if biased:
        router.add_selection_bias()
        bias = torch.tensor([0.5, 0.0, -0.5, 0.2])
        router.selection_bias.copy_(bias)

    def define(x):
        probs = sigmoid(scores(router, x))
        chosen = largest([p + b for p, b in zip(probs, bias, strict=True)], 2)
        weights = shared_out(probs, chosen) if renorm else only(probs, chosen)
        return [scale * w for w in weights]

    assert_routes_as(router, define)


def test_a_selection_bias_changes_the_choice_and_no_weight():
    for name in ("top_k", "sigmoid", "cosine", "rank_wise"):
        router = make_router(
            {"name": name, "k": 1} | ({"normalize": "none"} if name == "top_k" else {})
        )
        x = hidden()
        before = router(x, ALL_REAL)
        router.add_selection_bias()
        assert torch.equal(router(x, ALL_REAL).weights, before.weights)
        router.selection_bias[2] = 10.0
        after = router(x, ALL_REAL)
        assert (after.weights[:, 2] != 0).all()
        assert torch.equal(after.probs, before.probs)


@pytest.mark.parametrize("renorm", [True, False])
def test_rank_wise_is_a_biased_choice_among_ranks(renorm):
    router = make_router({"name": "rank_wise", "k": 3, "renorm": renorm})
    router.add_selection_bias()
    router.selection_bias.copy_(torch.tensor([0.3, 0.0, -0.3, 0.1]))

    def define(x):
        probs = softmax(scores(router, x))
        chosen = largest([p + b for p, b in zip(probs, router.selection_bias, strict=True)], 3)
        return shared_out(probs, chosen) if renorm else only(probs, chosen)

    assert_routes_as(router, define)


def test_cosine_is_the_angle_to_the_expert_embeddings():
    """X-MoE, https://arxiv.org/abs/2204.09179, eq. 5-6."""
    router = make_router({"name": "cosine", "dim": 3})

    def define(x):
        low = [(row * x).sum() for row in router.weight]
        length = sum(v * v for v in low).sqrt()
        logits = []
        for row in router.embeddings:
            dot = sum(a * b for a, b in zip(low, row, strict=True))
            logits.append(dot / length / row.square().sum().sqrt() / router.log_temperature.exp())
        probs = softmax([v.squeeze() for v in logits])
        return shared_out(probs, largest(probs, 2))

    assert_routes_as(router, define)


def test_a_cosine_does_not_depend_on_the_length_of_the_hidden_state():
    router, x = make_router("cosine"), hidden()
    assert_close(router(x, ALL_REAL).weights, router(100 * x, ALL_REAL).weights)


def test_gumbel_without_noise_is_a_softmax():
    router = make_router({"name": "gumbel", "temperature": 2.0}).eval()
    assert_routes_as(router, lambda x: softmax([v / 2 for v in scores(router, x)]))


def test_gumbel_samples_experts_by_their_probabilities():
    """Jang 2017: the largest of log p + Gumbel noise is distributed as p (the Gumbel-max trick)."""
    router = make_router({"name": "gumbel", "straight_through": True})
    router.weight.data *= 0.2
    x = hidden(1).expand(20_000, D)
    routing = router(x, context(20_000))
    share = (routing.weights > 0.5).double().mean(0)
    spread = (routing.probs[0] * (1 - routing.probs[0]) / 20_000).sqrt()
    assert ((share - routing.probs[0]).abs() < 5 * spread).all()


def test_straight_through_is_hard_forward_and_soft_backward():
    x = hidden().requires_grad_()
    results = []
    for straight in (True, False):
        torch.manual_seed(5)
        router = make_router({"name": "gumbel", "straight_through": straight})
        routing = router(x, ALL_REAL)
        results.append((routing.weights, torch.autograd.grad(routing.weights[:, 1].sum(), x)[0]))
    (hard, hard_grad), (soft, soft_grad) = results
    assert set(hard.flatten().tolist()) == {0.0, 1.0}
    assert torch.equal(hard.argmax(-1), soft.argmax(-1))
    assert_close(hard_grad, soft_grad)


@pytest.mark.parametrize(("k_groups", "k"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_hierarchical_multiplies_the_weights_of_both_levels(k_groups, k):
    router = make_router({"name": "hierarchical", "k_groups": k_groups, "k": k})

    def level(logits, count):
        probs = softmax(logits)
        chosen = largest(probs, count)
        return only(probs, chosen) if count == 1 else shared_out(probs, chosen)

    def define(x):
        groups = level([(row * x).sum() for row in router.group_weight], k_groups)
        inside = scores(router, x)
        return [
            g * w
            for number, g in enumerate(groups)
            for w in level(inside[2 * number : 2 * number + 2], k)
        ]

    assert_routes_as(router, define)
    routing = router(hidden(), ALL_REAL)
    assert (stats.active(routing) == k_groups * k).all()


# --- null experts


def test_null_experts_take_slots_and_the_others_share_the_weight():
    """AdaMoE, https://arxiv.org/abs/2406.13233: the weights of the true experts sum to one."""
    router = make_router({"name": "top_k", "k": 3, "null_experts": 2})

    def define(x):
        probs = softmax(scores(router, x))
        chosen = largest(probs, 3)
        real = {i for i in chosen if i < E}
        own = shared_out(probs[:E], real) if real else [p * 0 for p in probs[:E]]
        return own + [p if i + E in chosen else p * 0 for i, p in enumerate(probs[E:])]

    weights = assert_routes_as(router, define, tokens=101)
    assert set((weights[:, :E] != 0).sum(-1).tolist()) >= {1, 2, 3}
    assert not router.sums_to_one


def test_a_token_of_null_experts_only_keeps_the_base_output():
    router = make_router({"name": "top_k", "k": 1, "null_experts": 3})
    router.weight.data[:E] *= 1e-6
    routing = router(hidden(101), context(101))
    nothing = ~(routing.expert_weights != 0).any(-1)
    assert nothing.any()
    assert (routing.weights[nothing, E:] != 0).any(-1).all()


def test_the_load_of_null_experts_is_their_average():
    routing = make_router({"name": "top_k", "k": 2, "null_experts": 2})(hidden(), ALL_REAL)
    used = (routing.weights != 0).double().sum(0)
    load = stats.load(routing)
    assert_close(load[:E], used[:E] / (2 * T))
    assert_close(load[E:], torch.full((2,), float(used[E:].mean()) / (2 * T), dtype=torch.float64))
    unpacked = stats.unpack(stats.pack(routing, []), 0, null_experts=2)
    assert unpacked.null_share == pytest.approx(float(used[E:].sum()) / (2 * T))
    assert unpacked.active == pytest.approx(float(used[:E].sum()) / T)
    assert len(unpacked.load) == E


# --- options


def test_a_cost_lowers_the_logit_of_a_large_expert():
    router, plain = (make_router({"name": "soft", "cost_aware": c}) for c in (0.5, 0.0))
    plain.load_state_dict(router.state_dict())
    costs = (0.25, 0.5, 1.0, 1.0)
    for each in (router, plain):
        each.set_costs(costs)
    x = hidden()
    lowered = plain(x, ALL_REAL).logits - 0.5 * torch.tensor(costs, dtype=torch.float64)
    assert_close(router(x, ALL_REAL).logits, lowered)


def test_gate_dropout_hides_experts_in_training_only():
    router = make_router({"name": "top_k", "k": 1})
    router.gate_dropout = 0.5
    x = hidden(1).expand(400, D)
    seen = (router(x, context(400)).weights != 0).any(0)
    assert seen.all()
    assert (router.eval()(x, context(400)).weights != 0).any(0).sum() == 1
