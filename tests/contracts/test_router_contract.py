"""What every router promises, checked for all of them at once."""

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from moeadapt import stats
from moeadapt.balance import BALANCE, BalanceConfig, Mixture, parse_balance
from moeadapt.errors import ConfigError
from moeadapt.routers import ROUTERS, Router
from moeadapt.routing import TokenContext
from tests.contracts.kit import ROUTER_SPECS, a_mixture, causal_routers, label, routers
from tests.samples import (
    ALL_REAL,
    D,
    E,
    T,
    context,
    hidden,
    make_router,
)

NO_TIES = {"dynamic", "expert_choice", "hash", "relu"}
"""Routers that compare a score with a threshold, or choose by something else than scores."""

BOUNDED = {"cosine", "dynamic"}
"""Routers whose logits cannot be large."""


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@routers
def test_probs_sum_to_one_and_so_do_weights_that_claim_it(spec):
    router = make_router(spec)
    routing = router(hidden(), ALL_REAL)
    ones = torch.ones(T, dtype=torch.float64)
    assert_close(routing.probs.sum(-1), ones)
    if router.sums_to_one:
        assert_close(routing.weights.sum(-1), ones)


@routers
def test_a_routing_knows_its_shapes_before_the_data(spec):
    router = make_router(spec)
    routing = router(hidden(), ALL_REAL)
    shape = (T, router.width)
    assert routing.logits.shape == routing.probs.shape == routing.weights.shape == shape
    assert routing.expert_weights.shape == (T, E)
    assert isinstance(routing.max_active, int)
    assert 1 <= routing.max_active <= E


@routers
def test_no_token_uses_more_experts_than_max_active(spec):
    routing = make_router(spec)(hidden(101), context(101))
    assert stats.active(routing).max() <= routing.max_active


@routers
def test_the_index_form_holds_all_of_the_weights(spec):
    routing = make_router(spec)(hidden(), ALL_REAL)
    ids, weights = routing.slots()
    rebuilt = torch.zeros_like(routing.expert_weights).scatter(-1, ids, weights)
    assert torch.equal(rebuilt, routing.expert_weights)


@causal_routers
def test_a_token_is_routed_alone_as_in_a_batch(spec):
    router, x = make_router(spec).eval(), hidden()
    together = router(x, ALL_REAL)
    for t in range(T):
        alone = router(x[t : t + 1], replace(context(1), token_ids=torch.tensor([t])))
        for name in ("logits", "probs", "weights"):
            assert_close(getattr(alone, name)[0], getattr(together, name)[t])


@causal_routers
@pytest.mark.parametrize("training", [False, True])
def test_other_tokens_change_not_one_bit_of_a_routing(spec, training):
    router, x = make_router(spec).train(training), hidden()
    y = x.clone()
    y[1:] = 1e3 * hidden(T - 1)
    torch.manual_seed(1)
    first = router(x, ALL_REAL)
    torch.manual_seed(1)
    second = router(y, ALL_REAL)
    assert torch.equal(first.weights[0], second.weights[0])
    assert torch.equal(first.probs[0], second.probs[0])


@pytest.mark.parametrize("spec", [s for s in ROUTER_SPECS if s["name"] not in NO_TIES], ids=label)
def test_equal_scores_go_to_the_lowest_experts(spec):
    router = make_router(spec).eval()
    if getattr(router, "bias", None) is not None:
        nn.init.zeros_(router.bias)
    torch.manual_seed(3)
    used = router(torch.zeros(T, D, dtype=torch.float64), ALL_REAL).weights != 0
    assert used[:, 0].all()
    assert not (used[:, 1:] & ~used[:, :-1]).any()


def losses_for(router: Router) -> dict[str, BalanceConfig]:
    """Return every loss that this router allows."""
    allowed = {}
    for name in BALANCE:
        (loss,) = parse_balance({name: 1.0}).values()
        with contextlib.suppress(ConfigError):
            loss.check(router)
            loss.prepare(router)
            allowed[name] = loss
    return allowed


def padded_run(spec: Any, x: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return everything that is counted, and the gradient of every loss."""
    router, x = make_router(spec), x.clone().requires_grad_()
    torch.manual_seed(1)
    routing = router(x, context(T, mask))
    mixture = a_mixture(router, x)
    values = {name: loss.loss(routing, mixture) for name, loss in losses_for(router).items()}
    packed = stats.pack(routing, list(values.values()))
    counted = {**values, "packed": packed, "load": stats.load(routing)}
    total = sum(value for value in values.values() if value.requires_grad)
    if isinstance(total, torch.Tensor):
        wanted = {"x": x, **dict(router.named_parameters())}
        grads = torch.autograd.grad(total, list(wanted.values()), allow_unused=True)
        found = zip(wanted, grads, strict=True)
        counted |= {f"grad {name}": grad for name, grad in found if grad is not None}
    counted["importance"] = stats.importance(routing)
    return {name: value.detach() for name, value in counted.items()}


@routers
@pytest.mark.parametrize("poison", [-3.0, 1e5, float("nan"), float("inf")])
def test_padding_is_never_counted(spec, poison):
    mask = torch.tensor([False, False, True, True, False, True, True])
    clean = hidden()
    dirty = clean.clone()
    dirty[~mask] = poison * (1 + hidden()[~mask].abs())
    torch.manual_seed(2)
    expected = padded_run(spec, clean, mask)
    torch.manual_seed(2)
    found = padded_run(spec, dirty, mask)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if name == "grad x":
            assert torch.equal(found[name][mask], value[mask])
            assert not value[~mask].any()
        elif name.startswith("grad ") and not torch.isfinite(dirty).all():
            continue  # dW = dlogits^T x, and 0 * NaN is NaN: true of every linear layer
        else:
            assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")


@routers
def test_padding_counts_as_absence(spec):
    mask = torch.tensor([False, False, True, True, False, True, True])
    router, x = make_router(spec).eval(), hidden()
    without = TokenContext(
        sequences=torch.zeros(4, dtype=torch.int64), token_ids=torch.arange(T)[mask]
    )
    masked, short = router(x, context(T, mask)), router(x[mask], without)
    whole = a_mixture(router, x)
    part = replace(whole, hidden=x[mask])
    for loss in losses_for(router).values():
        assert_close(loss.loss(masked, whole), loss.loss(short, part))
    assert_close(stats.pack(masked, []), stats.pack(short, []))


@routers
def test_nothing_but_padding_gives_finite_losses_and_zero_counts(spec):
    router, x = make_router(spec), hidden()
    routing = router(x, context(T, torch.zeros(T, dtype=torch.bool)))
    for loss in losses_for(router).values():
        assert torch.isfinite(loss.loss(routing, a_mixture(router, x)))
    counted = stats.pack(routing, [])
    assert counted[0] == 1
    assert not counted[1:].any()


@routers
def test_gradients_reach_every_parameter_of_a_router(spec):
    router = make_router(spec).train()
    # Enough tokens that some of them use more than one expert.
    weights = router(hidden(101), context(101)).weights
    parameters = list(router.parameters())
    if not parameters:
        assert not weights.requires_grad
        return
    readout = torch.randn_like(weights)
    for gradient in torch.autograd.grad((weights * readout).sum(), parameters):
        assert gradient.any()


def float_mixture(router: Router, x: torch.Tensor) -> Mixture:
    """Return a mixture whose experts are float32, as they are in a model of any dtype."""
    mixture = a_mixture(router, x)
    for bank in mixture.banks:
        for name in bank.factor_names:
            bank.factor(name).float()
    return mixture


@routers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_logits_of_ten_thousand_stay_finite(spec, dtype, autocast):
    router = ROUTERS.parse(spec).build(D, E).train()
    x = hidden().to(dtype).requires_grad_()
    for _ in range(2):  # jitter and noise move the size a little
        size = float(router(x, ALL_REAL).logits.detach().abs().max())
        for parameter in router.parameters():
            parameter.data.mul_(1e4 / size)
    around = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with around:
        routing = router(x, ALL_REAL)
        total = routing.weights.square().sum()
        mixture = float_mixture(router, x)
        for loss in losses_for(router).values():
            total = total + loss.loss(routing, mixture)
    assert routing.weights.dtype == routing.probs.dtype == routing.logits.dtype == torch.float32
    if list(router.parameters()) and spec["name"] not in BOUNDED:
        assert routing.logits.detach().abs().max() > 1e3
    for value in (routing.weights, routing.probs, total, stats.pack(routing, [])):
        assert torch.isfinite(value).all()
    if total.requires_grad:
        (1e-6 * total).backward()  # float16 ends at 65504
        for leaf in (x, *router.parameters()):
            assert leaf.grad is None or torch.isfinite(leaf.grad).all()


@routers
@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.bfloat16().half().float(),
        lambda m: m.to("cpu", torch.float16),
        lambda m: m.type(torch.bfloat16),
    ],
    ids=["to_bf16", "half", "there_and_back", "device_and_dtype", "type"],
)
def test_a_router_keeps_every_bit_when_its_model_is_cast_down(spec, cast):
    model = nn.Sequential(nn.Linear(2, 2), ROUTERS.parse(spec).build(D, E))
    before = {name: p.clone() for name, p in model[1].named_parameters()}
    cast(model)
    after = dict(model[1].named_parameters())
    assert before.keys() == after.keys()
    for name, parameter in after.items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name])
        assert isinstance(parameter, nn.Parameter)


@routers
def test_a_router_stays_float32_through_the_meta_device(spec):
    router = ROUTERS.parse(spec).build(D, E).to(device="meta", dtype=torch.bfloat16)
    assert {(p.dtype, p.device.type) for p in router.parameters()} <= {(torch.float32, "meta")}
    router = router.to(torch.float16).to_empty(device="cpu").to(torch.bfloat16)
    assert {(p.dtype, p.device.type) for p in router.parameters()} <= {(torch.float32, "cpu")}


@routers
def test_a_router_follows_its_model_up_to_double(spec):
    router = ROUTERS.parse(spec).build(D, E).double()
    assert {p.dtype for p in router.parameters()} <= {torch.float64}
    assert router(hidden(), ALL_REAL).weights.dtype == torch.float64


@routers
def test_a_router_owns_its_parameters_itself(spec):
    router = ROUTERS.parse(spec).build(D, E)
    assert not list(router.children())
    assert all("." not in name for name in router.state_dict())
