"""The contract of every registered component, checked for all of them at once."""

import contextlib
import inspect
import json
import sys
import warnings
from typing import Any, get_args

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from moeadapt import stats
from moeadapt.balance import BALANCE, parse_balance
from moeadapt.dispatch import Slots, combine, contract, expand, ffn_reference, mix, mix_reference
from moeadapt.errors import ConfigError
from moeadapt.experts import EXPERTS
from moeadapt.registry import Registry
from moeadapt.routers import ROUTERS
from moeadapt.routing import TokenContext
from tests.samples import (
    ALL_REAL,
    OUT,
    D,
    E,
    T,
    balanced,
    collapsed,
    factors_of,
    hidden,
    make_bank,
    make_router,
)

# Every registered router with its defaults, and settings that take another path through it.
ROUTER_SPECS = [
    *({"name": name} for name in sorted(ROUTERS)),
    {"name": "top_k", "k": 1},
    {"name": "top_k", "k": E},
    {"name": "top_k", "k": 3, "normalize": "none", "bias": True},
    {"name": "top_k", "normalize": "topk_softmax", "temperature": 0.5},
    {"name": "top_k", "norm": "rms", "noise": "softplus", "jitter": 0.1},
    {"name": "top_k", "norm": "standardize", "noise": "gaussian", "input": "stop_gradient"},
]
REGISTRIES = (ROUTERS, BALANCE, EXPERTS)
FIELDS = [
    (registry, name, field)
    for registry in REGISTRIES
    for name in sorted(registry)
    for field in registry[name].model_fields
]
ENTRIES = [(registry, name) for registry in REGISTRIES for name in sorted(registry)]


def label(value: Any) -> str | None:
    """Name a case by what differs in it."""
    if isinstance(value, Registry):
        return value.kind.replace(" ", "_")
    return "-".join(map(str, value.values())) if isinstance(value, dict) else None


routers = pytest.mark.parametrize("spec", ROUTER_SPECS, ids=label)
losses = pytest.mark.parametrize("loss_name", sorted(BALANCE))
experts = pytest.mark.parametrize("expert", sorted(EXPERTS))
entries = pytest.mark.parametrize(("registry", "name"), ENTRIES, ids=label)
fields = pytest.mark.parametrize(("registry", "name", "field"), FIELDS, ids=label)
shared = pytest.mark.parametrize("num_shared", [0, 2])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --- routers


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
    routing = make_router(spec)(hidden(), ALL_REAL)
    assert routing.logits.shape == routing.probs.shape == routing.weights.shape == (T, E)
    assert isinstance(routing.max_active, int)
    assert 1 <= routing.max_active <= E


@routers
def test_no_token_uses_more_experts_than_max_active(spec):
    routing = make_router(spec)(hidden(101), ALL_REAL)
    assert stats.active(routing).max() <= routing.max_active


@routers
def test_the_index_form_holds_all_of_the_weights(spec):
    routing = make_router(spec)(hidden(), ALL_REAL)
    ids, weights = routing.slots()
    rebuilt = torch.zeros_like(routing.weights).scatter(-1, ids, weights)
    assert torch.equal(rebuilt, routing.weights)


@routers
def test_a_token_is_routed_alone_as_in_a_batch(spec):
    router, x = make_router(spec).eval(), hidden()
    together = router(x, ALL_REAL)
    for t in range(T):
        alone = router(x[t : t + 1], ALL_REAL)
        for name in ("logits", "probs", "weights"):
            assert_close(getattr(alone, name)[0], getattr(together, name)[t])


@routers
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


@routers
def test_equal_scores_go_to_the_lowest_experts(spec):
    router = make_router(spec).eval()
    if getattr(router, "bias", None) is not None:
        nn.init.zeros_(router.bias)
    used = router(torch.zeros(T, D, dtype=torch.float64), ALL_REAL).weights != 0
    assert used[:, 0].all()
    assert not (used[:, 1:] & ~used[:, :-1]).any()


def padded_run(spec: Any, x: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return everything that is counted, and the gradient of every loss."""
    router, x = make_router(spec), x.clone().requires_grad_()
    torch.manual_seed(1)
    routing = router(x, TokenContext(mask=mask))
    values = {name: parse_balance({name: 1.0})[name].loss(routing) for name in BALANCE}
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
    masked, short = router(x, TokenContext(mask=mask)), router(x[mask], ALL_REAL)
    for name in BALANCE:
        loss = parse_balance({name: 1.0})[name]
        assert_close(loss.loss(masked), loss.loss(short))
    assert_close(stats.pack(masked, []), stats.pack(short, []))


@routers
def test_nothing_but_padding_gives_finite_losses_and_zero_counts(spec):
    routing = make_router(spec)(hidden(), TokenContext(mask=torch.zeros(T, dtype=torch.bool)))
    for name in BALANCE:
        assert torch.isfinite(parse_balance({name: 1.0})[name].loss(routing))
    counted = stats.pack(routing, [])
    assert counted[0] == 1
    assert not counted[1:].any()


@routers
def test_gradients_reach_every_parameter_of_a_router(spec):
    router = make_router(spec).train()
    weights = router(hidden(), ALL_REAL).weights
    parameters = list(router.parameters())
    if not parameters:
        assert not weights.requires_grad
        return
    readout = torch.randn_like(weights)
    for gradient in torch.autograd.grad((weights * readout).sum(), parameters):
        assert gradient.any()


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
        for name in BALANCE:
            total = total + parse_balance({name: 1.0})[name].loss(routing)
    assert routing.weights.dtype == routing.probs.dtype == routing.logits.dtype == torch.float32
    if list(router.parameters()):
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


# --- configs


@entries
def test_a_default_config_survives_json(registry, name):
    config = registry.parse(name)
    assert registry.parse(json.loads(json.dumps(registry.spec(config)))) == config


@fields
def test_whatever_a_field_accepts_survives_json(registry, name, field):
    default = registry.parse(name)
    words = every_arg(registry[name].model_fields[field].annotation)
    accepted = []
    for value in [True, False, 1, 3, 0.125, 0.1, None, *words]:
        with contextlib.suppress(ConfigError):
            accepted.append(registry.parse({"name": name, field: value}))
    for config in accepted:
        assert registry.parse(json.loads(json.dumps(registry.spec(config)))) == config
    assert len(words) == 1 or any(config != default for config in accepted)


def every_arg(annotation: Any) -> list[Any]:
    """Return the words of every `Literal` inside an annotation."""
    args = get_args(annotation)
    words = [arg for arg in args if isinstance(arg, str | bool)]
    return words + [word for arg in args for word in every_arg(arg)]


@fields
@pytest.mark.parametrize(
    "value", [[], {}, "no such word", float("nan"), float("inf"), b"1", 1j], ids=repr
)
def test_a_value_of_the_wrong_type_is_refused_by_name(registry, name, field, value):
    with pytest.raises(ConfigError, match=rf"{name}.*\b{field}="):
        registry.parse({"name": name, field: value})


@fields
def test_a_value_just_out_of_range_is_refused_by_name(registry, name, field):
    limits = {
        kind: getattr(constraint, kind)
        for constraint in registry[name].model_fields[field].metadata
        for kind in ("ge", "gt", "le", "lt")
        if getattr(constraint, kind, None) is not None
    }
    step = 1 if registry[name].model_fields[field].annotation is int else 1e-6
    outside = {"ge": -step, "gt": 0, "le": step, "lt": 0}
    for kind, limit in limits.items():
        with pytest.raises(ConfigError, match=rf"{name}.*\b{field}="):
            registry.parse({"name": name, field: limit + outside[kind]})


@entries
def test_an_unknown_field_is_refused_and_the_known_ones_are_named(registry, name):
    with pytest.raises(ConfigError, match=r"unknown field 'no_such_field'; one of \[") as caught:
        registry.parse({"name": name, "no_such_field": 1})
    for field in registry[name].model_fields:
        assert repr(field) in str(caught.value)


@entries
def test_an_entry_names_its_source(registry, name):
    doc = sys.modules[registry[name].__module__].__doc__ or ""
    assert "Source: " in doc
    assert inspect.getdoc(registry[name])


@entries
def test_every_field_is_documented(registry, name):
    described = "\n".join(inspect.getdoc(cls) or "" for cls in registry[name].__mro__)
    for field in registry[name].model_fields:
        assert f"    {field}: " in described


# --- balance losses


@losses
@routers
def test_a_balance_loss_is_one_finite_number_that_trains_the_router(loss_name, spec):
    router = make_router(spec)
    routing = router(hidden(), ALL_REAL)
    loss = parse_balance({loss_name: 1.0})[loss_name].loss(routing)
    assert loss.shape == ()
    assert loss.dtype == torch.float64
    assert torch.isfinite(loss)
    if routing.logits.requires_grad:
        assert torch.autograd.grad(loss, router.weight)[0].any()


@losses
@pytest.mark.parametrize("k", [1, 2])
def test_collapse_costs_more_than_balance(loss_name, k):
    loss = parse_balance({loss_name: 1.0})[loss_name]
    assert loss.loss(collapsed(k)) > loss.loss(balanced(k))


@losses
def test_a_coefficient_of_zero_and_above_is_accepted(loss_name):
    for coef in (0, 0.0, 1e-3, 5):
        assert parse_balance({loss_name: coef})[loss_name].coef == coef


# --- experts


@experts
@shared
def test_the_fast_mixture_equals_its_definition_in_value_and_every_gradient(expert, num_shared):
    bank = make_bank(expert, num_shared=num_shared)
    x, onto = hidden().requires_grad_(), hidden(T, OUT).requires_grad_()
    weights = torch.rand(T, E, dtype=torch.float64)
    weights = (weights * (weights > 0.3)).requires_grad_()
    leaves = [x, weights, onto, *factors_of(bank)]
    upstream = hidden(T, OUT)
    expected = mix_reference(x, weights, bank, onto)
    wanted = torch.autograd.grad(expected, leaves, upstream)
    for inplace in (False, True):
        found = mix(x, weights, bank, onto * 1, inplace=inplace)
        assert_close(found, expected)
        for fast, slow in zip(torch.autograd.grad(found, leaves, upstream), wanted, strict=True):
            assert slow.any()
            assert_close(fast, slow)


@experts
@routers
def test_a_routed_mixture_trains_its_router_as_defined(expert, spec):
    router, bank = make_router(spec), make_bank(expert)
    x = hidden().requires_grad_()
    leaves = [x, *factors_of(bank), *router.parameters()]
    results = []
    for run in (mix, mix_reference):
        torch.manual_seed(1)
        y = run(x, router(x, ALL_REAL).weights, bank, x[:, :OUT] * 1)
        grads = torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)
        results.append([y, *(g for g in grads if g is not None)])
    for fast, slow in zip(*results, strict=True):
        assert_close(fast, slow)


@experts
def test_without_weights_every_expert_counts_fully(expert):
    bank, x, onto = make_bank(expert, num_shared=1), hidden(), hidden(T, OUT)
    total = onto + sum(bank.apply_one(x, e) for e in range(bank.size.total_experts))
    assert_close(mix(x, None, bank, onto), total)


@experts
@shared
def test_delta_weight_is_what_apply_one_applies(expert, num_shared):
    bank, x = make_bank(expert, num_shared=num_shared), hidden()
    for e in range(bank.size.total_experts):
        assert bank.delta_weight(e).shape == (OUT, D)
        assert bank.delta_weight(e).any()
        assert_close(bank.apply_one(x, e), x @ bank.delta_weight(e).T)


@experts
@shared
@pytest.mark.parametrize("init", ["zero_b", "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_fresh_bank_changes_not_one_bit(expert, num_shared, init, dtype):
    bank = make_bank(expert, num_shared=num_shared, init=init)
    for name in bank.factor_names:
        bank.factor(name).float()
    x, onto = hidden().to(dtype), hidden(T, OUT).to(dtype)
    weights = torch.rand(T, E)
    for inplace in (False, True):
        assert torch.equal(mix(x, weights, bank, onto.clone(), inplace=inplace), onto)
    for e in range(bank.size.total_experts):
        assert not bank.delta_weight(e).any()


@experts
def test_the_random_start_has_no_expert_without_effect(expert):
    bank = make_bank(expert, num_shared=2, init="random")
    assert all(bank.delta_weight(e).any() for e in range(bank.size.total_experts))


@experts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_experts_keep_the_dtype_of_the_base(expert, dtype):
    bank = make_bank(expert)
    for name in bank.factor_names:
        bank.factor(name).float()
    x, onto, weights = hidden().to(dtype), hidden(T, OUT).to(dtype), torch.rand(T, E)
    y = mix(x, weights, bank, onto)
    assert y.dtype == dtype
    exact = mix_reference(x.float(), weights, bank, onto.float())
    size = float(exact.detach().abs().max())
    assert_close(y.float(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps * size)
    assert mix(x, weights, bank, onto.float()).dtype == torch.float32


# --- experts that span an FFN


def make_ffn(expert: str, num_shared: int, gated: bool, bias: bool):
    """Return `(fast, slow, leaves)`: both forms of one FFN of width `width`, and its tensors."""
    width = 11
    banks = {
        "gate": make_bank(expert, D, width, num_shared=num_shared),
        "up": make_bank(expert, D, width, num_shared=num_shared),
        "down": make_bank(expert, width, OUT, num_shared=num_shared),
    }
    base = {
        name: nn.Linear(bank.size.in_features, bank.size.out_features, bias=bias).double()
        for name, bank in banks.items()
    }
    always = range(E, E + num_shared)

    def act(gate, up):
        return F.silu(gate) * up if gated else F.gelu(up)

    def fast(x, weights, max_active, sums_to_one):
        slots = Slots.of(weights, max_active, sums_to_one=sums_to_one)
        gate, up = (expand(x, slots, banks[n], base[n](x)) for n in ("gate", "up"))
        return contract(act(gate, up), slots, banks["down"], base["down"])

    def project(name, x, e):
        own = [] if e is None else [e]
        return base[name](x) + sum(banks[name].apply_one(x, i) for i in [*own, *always])

    def expert_ffn(x, e):
        return project("down", act(project("gate", x, e), project("up", x, e)), e)

    def slow(x, weights, max_active, sums_to_one):
        return ffn_reference(x, weights, expert_ffn)

    used = banks if gated else {n: banks[n] for n in ("up", "down")}
    leaves = [factor for bank in used.values() for factor in factors_of(bank)]
    leaves += [parameter for name in used for parameter in base[name].parameters()]
    return fast, slow, leaves


@experts
@routers
@pytest.mark.parametrize(("gated", "bias", "num_shared"), [(True, False, 2), (False, True, 0)])
def test_the_fast_ffn_mixture_equals_its_definition(expert, num_shared, spec, gated, bias):
    router = make_router(spec)
    fast, slow, leaves = make_ffn(expert, num_shared, gated, bias)
    x = hidden().requires_grad_()
    leaves = [x, *leaves, *router.parameters()]
    upstream, results = hidden(T, OUT), []
    for run in (fast, slow):
        torch.manual_seed(1)
        routing = router(x, ALL_REAL)
        y = run(x, routing.weights, routing.max_active, router.sums_to_one)
        grads = torch.autograd.grad(y, leaves, upstream, allow_unused=True)
        results.append([y, *(torch.zeros(()) if g is None else g for g in grads)])
    for quick, definition in zip(*results, strict=True):
        assert_close(quick, definition)


@experts
@routers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_ffn_bank_changes_not_one_bit(expert, spec, dtype):
    router = ROUTERS.parse(spec).build(D, E)
    banks = [make_bank(expert, *sizes, init="zero_b") for sizes in ((D, 11), (D, 11), (11, OUT))]
    for bank in banks:
        for name in bank.factor_names:
            bank.factor(name).float()
    up, gate, down = (
        nn.Linear(b.size.in_features, b.size.out_features, dtype=dtype, bias=False) for b in banks
    )
    x = hidden().to(dtype)
    slots = Slots.of(router(x, ALL_REAL).weights, router.max_active, sums_to_one=router.sums_to_one)
    # relu is exact; on a CPU silu may differ in its last bit between positions of one tensor.
    wide = F.relu(expand(x, slots, banks[0], gate(x))) * expand(x, slots, banks[1], up(x))
    narrow = F.relu(gate(x)) * up(x)
    assert torch.equal(wide, narrow.expand_as(wide))
    assert torch.equal(combine(wide, slots), narrow)
    assert torch.equal(contract(wide, slots, banks[2], down), down(narrow))


def test_a_constant_weight_of_one_warns_that_it_cannot_train():
    with pytest.warns(UserWarning, match="never trains the router"):
        ROUTERS.parse({"name": "top_k", "k": 1, "normalize": "renorm"}).build(D, E)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ROUTERS.parse({"name": "top_k", "k": 1}).build(D, E)
