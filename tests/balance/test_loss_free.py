"""Balance without a loss: the bias moves by its rule, and balances a router."""

import pytest
import torch
from torch.testing import assert_close

from moeadapt import stats
from moeadapt.balance import BALANCE
from moeadapt.balance.loss_free import LossFreeConfig
from moeadapt.errors import ConfigError
from moeadapt.routers import ROUTERS
from tests.samples import ALL_REAL, D, E, balanced, collapsed, hidden, make_router, mixture_of


def prepared(spec="top_k", **fields):
    router, config = make_router(spec), LossFreeConfig(**fields)
    config.check(router)
    config.prepare(router)
    return router, config


def step(config, router, uses):
    uses = torch.tensor(uses)
    config.after_step(router, uses.sum(), uses)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_the_loss_is_zero_at_balance_and_at_collapse_without_a_gradient():
    for routing in (balanced(1), collapsed()):
        value = LossFreeConfig().loss(routing, mixture_of())
        assert value == 0
        assert value.shape == ()
        assert value.dtype == routing.logits.dtype
        assert not value.requires_grad


def test_the_bias_follows_the_rule_of_the_paper():
    router, config = prepared(rate=0.25)
    assert config.acts_after_step
    assert router.selection_bias.tolist() == [0.0] * E
    for uses, expected in (
        ([10.0, 2.0, 0.0, 4.0], [-0.25, 0.25, 0.25, 0.0]),  # the mean is 4
        ([1.0, 1.0, 1.0, 5.0], [0.0, 0.5, 0.5, -0.25]),
        ([7.0, 7.0, 7.0, 7.0], [0.0, 0.5, 0.5, -0.25]),
        ([0.0, 0.0, 0.0, 0.0], [0.0, 0.5, 0.5, -0.25]),
    ):
        step(config, router, uses)
        assert router.selection_bias.tolist() == expected


def test_null_experts_move_together():
    router, config = prepared({"name": "top_k", "k": 3, "null_experts": 2}, rate=1.0)
    step(config, router, [5.0, 1.0, 3.0, 3.0, 6.0, 0.0])
    assert router.selection_bias.tolist() == [-1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_the_bias_is_saved_and_changes_the_choice_but_no_weight():
    router, config = prepared({"name": "top_k", "k": 1}, rate=5.0)
    x = hidden()
    before = router(x, ALL_REAL)
    step(config, router, [9.0, 0.0, 9.0, 9.0])
    assert "selection_bias" in router.state_dict()
    after = router(x, ALL_REAL)
    assert (after.weights != 0)[:, 1].all()
    assert torch.equal(after.probs, before.probs)
    assert torch.equal(after.weights[:, 1], before.probs[:, 1])


@pytest.mark.parametrize("spec", ["top_k", "sigmoid", {"name": "rank_wise", "k": 2}, "cosine"])
def test_a_closed_loop_balances_the_load(spec):
    router, config = prepared(spec, rate=0.01)
    x = hidden(211) + 1.0  # a common direction, which some experts like
    with torch.no_grad():
        loads = []
        for _ in range(400):
            routing = router(x, ALL_REAL)
            loads.append(stats.load(routing))
            uses = (routing.weights != 0).double().sum(0)
            config.after_step(router, torch.tensor(211.0), uses)
            assert torch.isfinite(router.selection_bias).all()
    settled = sum(loads[-100:]) / 100  # a sign has no smaller steps: each load swings around 1/E
    first = (loads[0] - 1 / E).abs().max()
    assert first > 0.1
    assert (settled - 1 / E).abs().max() < first / 5


@pytest.mark.parametrize("router", ["uniform", "hash", "relu", "top_p", "random"])
def test_a_router_that_a_bias_does_not_steer_is_refused(router):
    with pytest.raises(ConfigError, match=r"'loss_free'.* use one of ") as info:
        LossFreeConfig().check(make_router(router))
    named = str(info.value).rpartition("use one of ")[2].split(", ")
    steered = [name for name in ROUTERS if ROUTERS[name]().build(D, 8).ranks_with_bias]
    assert named == sorted(steered)
    assert "top_k" in named


def test_only_its_own_buffer_is_made():
    router = make_router("top_k")
    names = set(router.state_dict())
    for name in set(BALANCE) - {"loss_free", "null_rate"}:
        BALANCE[name]().prepare(router)
    assert set(router.state_dict()) == names
    LossFreeConfig().prepare(router)
    assert_close(router.state_dict()["selection_bias"], torch.zeros(E))
