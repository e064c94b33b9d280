"""What experts that span an FFN promise, checked for every router and expert type."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from moeadapt.dispatch import Slots, combine, contract, expand, ffn_reference
from moeadapt.routers import ROUTERS
from tests.contracts.kit import (
    ffn_experts,
    routers,
)
from tests.samples import (
    ALL_REAL,
    OUT,
    D,
    E,
    T,
    factors_of,
    hidden,
    make_bank,
    make_router,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


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
        gate, up = (expand(banks[n].down(x), slots, banks[n], base[n](x)) for n in ("gate", "up"))
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


@ffn_experts
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
        y = run(x, routing.expert_weights, routing.max_active, router.sums_to_one)
        grads = torch.autograd.grad(y, leaves, upstream, allow_unused=True)
        results.append([y, *(torch.zeros(()) if g is None else g for g in grads)])
    for quick, definition in zip(*results, strict=True):
        assert_close(quick, definition)


@ffn_experts
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
    slots = Slots.of(
        router(x, ALL_REAL).expert_weights, router.max_active, sums_to_one=router.sums_to_one
    )
    # relu is exact; on a CPU silu may differ in its last bit between positions of one tensor.
    wide = [
        expand(bank.down(x), slots, bank, base(x))
        for bank, base in zip(banks, (gate, up), strict=False)
    ]
    wide = F.relu(wide[0]) * wide[1]
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
