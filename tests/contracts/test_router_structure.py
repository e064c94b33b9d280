"""No router waits for the device or breaks a compiled graph, in training or outside."""

import pytest
import torch
from torch.testing import assert_close

from moeadapt.routers import route
from tests.contracts.kit import ROUTER_SPECS, label, routers
from tests.samples import D, T, context, hidden, make_router
from tests.structure.trace import SYNCHRONISING, names, recorded
from tests.tiny import adapted, batch, labels_of

MASK = torch.tensor([False, True, True, True, True, True, False])

# Sorting tokens is slow, but it is one kernel and waits for nothing.
WAITING = SYNCHRONISING - {"sort"}

ONE_EACH = list({spec["name"]: spec for spec in reversed(ROUTER_SPECS)}.values())
"""The first settings of each router: compiling takes seconds."""

LOOKING = [
    {"name": "soft", "per": "sequence"},
    {"name": "hash"},
    {"name": "expert_choice"},
    {"name": "dynamic"},
    {"name": "top_k", "k": 2, "null_experts": 2},
]


@pytest.fixture(autouse=True)
def _seed():
    torch._dynamo.reset()
    torch.manual_seed(0)


def run(router, x):
    """Return the weights and the gradient of the hidden states."""
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    weights = router(x, context(T, MASK)).weights
    if weights.requires_grad:
        (weights * torch.arange(router.width)).sum().backward()
    return weights.detach(), x.grad


@routers
@pytest.mark.parametrize("training", [True, False])
def test_a_router_never_waits_for_the_device(spec, training):
    router = make_router(spec).train(training)
    with recorded() as kernels:
        run(router, hidden())
    assert not set(names(kernels)) & WAITING


def test_a_decision_per_sequence_never_waits_for_the_device():
    router = make_router({"name": "top_k", "per": "sequence"})
    with recorded() as kernels:
        route(router, hidden(), context(T, MASK))
    assert not set(names(kernels)) & WAITING


@pytest.mark.compile
@pytest.mark.parametrize("spec", ONE_EACH, ids=label)
def test_a_router_is_one_graph(spec):
    # The sample of a compiled graph is another draw, so gumbel is compared without noise.
    router = make_router(spec).train(spec["name"] != "gumbel")
    compiled = torch.compile(router, backend="aot_eager", fullgraph=True)
    x = torch.randn(T, D, dtype=torch.float64)
    expected, found = run(router, x), run(compiled, x)
    assert_close(found[0], expected[0])
    if expected[1] is not None:
        assert_close(found[1], expected[1])


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("router", LOOKING, ids=lambda spec: spec["name"])
def test_a_model_whose_router_looks_further_is_one_graph(router):
    gradients = []
    for compiles in (False, True):
        model = adapted("llama", "block", router=router).train()
        model.config.use_cache = False
        call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiles else model
        call(**batch(), labels=labels_of(batch())).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    eager, compiled = gradients
    assert eager.keys() == compiled.keys()
    for name, gradient in eager.items():
        assert_close(compiled[name], gradient, atol=1e-5, rtol=1e-4)
