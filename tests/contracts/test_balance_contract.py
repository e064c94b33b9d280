"""What every balance loss promises, checked for all of them at once."""

import pytest
import torch

from moeadapt import stats
from moeadapt.balance import BALANCE, parse_balance
from moeadapt.errors import ConfigError
from tests.contracts.kit import ROUTER_SPECS, a_mixture, label, losses
from tests.samples import context, hidden, make_router


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def allows(loss_name, spec):
    """Whether a loss works with a router."""
    try:
        parse_balance({loss_name: 1.0})[loss_name].check(make_router(spec))
    except ConfigError:
        return False
    return True


PAIRS = [(name, spec) for name in sorted(BALANCE) for spec in ROUTER_SPECS if allows(name, spec)]


@losses
def test_every_loss_works_with_some_router(loss_name):
    assert any(name == loss_name for name, _ in PAIRS)


@pytest.mark.parametrize(("loss_name", "spec"), PAIRS, ids=label)
def test_a_balance_loss_is_one_finite_number_that_trains_something(loss_name, spec):
    router, x = make_router(spec), hidden(101)
    loss = parse_balance({loss_name: 1.0})[loss_name]
    loss.prepare(router)
    routing, mixture = router(x, context(101)), a_mixture(router, x)
    value = loss.loss(routing, mixture)
    assert value.shape == ()
    assert value.dtype == torch.float64
    assert torch.isfinite(value)
    factors = [mixture.banks[0].factor(name).weight for name in mixture.banks[0].factor_names]
    if loss.acts_after_step and not value.requires_grad:
        return
    if loss_name == "switch" and stats.load(routing).std() < 1e-12:
        return  # constant: every expert is used equally often whatever the router does
    if routing.logits.requires_grad or value.requires_grad:
        leaves = [*router.parameters(), *factors]
        grads = torch.autograd.grad(value, leaves, allow_unused=True)
        assert any(g is not None and g.norm() > 1e-8 for g in grads)


@losses
def test_a_number_alone_is_accepted_from_zero_on(loss_name):
    for coef in (0, 0.0, 1e-3, 5):
        config = parse_balance({loss_name: coef})[loss_name]
        assert getattr(config, config.shorthand) == coef


@losses
def test_a_refused_router_is_told_what_works(loss_name):
    loss = parse_balance({loss_name: 1.0})[loss_name]
    working = {spec["name"] for name, spec in PAIRS if name == loss_name}
    for spec in ROUTER_SPECS:
        if not allows(loss_name, spec):
            with pytest.raises(ConfigError) as caught:
                loss.check(make_router(spec))
            assert any(name in str(caught.value) for name in working)
