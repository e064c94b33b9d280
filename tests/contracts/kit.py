"""What the contract tests run over: every registry entry, and settings that take another path."""

from typing import Any

import pytest

from moeadapt.balance import BALANCE, Mixture
from moeadapt.experts import EXPERTS
from moeadapt.registry import Registry
from moeadapt.routers import ROUTERS, Router
from tests.samples import D, E, make_bank, make_router

ROUTER_SPECS = [
    *({"name": name} for name in sorted(ROUTERS) if name != "rank_wise"),
    {"name": "rank_wise", "k": 3},
    {"name": "top_k", "k": 1},
    {"name": "top_k", "k": E},
    {"name": "top_k", "k": 3, "normalize": "none", "bias": True},
    {"name": "top_k", "normalize": "topk_softmax", "temperature": 0.5},
    {"name": "top_k", "norm": "rms", "noise": "softplus", "jitter": 0.1},
    {"name": "top_k", "norm": "standardize", "noise": "gaussian", "input": "stop_gradient"},
    {"name": "top_k", "k": 3, "null_experts": 2},
    {"name": "top_k", "null_experts": 1, "cost_aware": 0.5},
    {"name": "cosine", "temperature": 0.5, "bias": True},
    {"name": "dynamic", "start": 3},
    {"name": "expert_choice", "k": 1.5},
    {"name": "gumbel", "straight_through": True, "temperature": 2.0},
    {"name": "hash", "k": 3},
    {"name": "hierarchical", "k_groups": 2, "k": 2},
    {"name": "hierarchical", "k": 2},
    {"name": "rank_wise", "k": 2, "renorm": False},
    {"name": "sigmoid", "renorm": False},
    {"name": "sigmoid", "scale": 2.5, "k": 3},
    {"name": "sparsegen", "spread": 0.3, "norm": "rms"},
    {"name": "threshold", "tau": 0.4, "renorm": False},
    {"name": "threshold", "learned": True},
    {"name": "top_p", "p": 0.9, "k_max": 2, "renorm": False},
]
"""Every registered router with its defaults, and settings that take another path through it."""

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


def where(wanted: Any) -> list[dict[str, Any]]:
    """Return the specs whose router has a property."""
    return [spec for spec in ROUTER_SPECS if wanted(ROUTERS.parse(spec).build(D, E))]


def a_mixture(router: Router, hidden: Any, expert: Any = "lora") -> Mixture:
    """Return what a loss may look at, for a router that has routed `hidden`."""
    return Mixture(router=router, banks=[make_bank(expert)], hidden=hidden)


def loss_value(loss: Any, spec: Any, routing: Any, hidden: Any) -> Any:
    """Return the loss of a routing made by a fresh router of `spec`."""
    return loss.loss(routing, a_mixture(make_router(spec), hidden))


routers = pytest.mark.parametrize("spec", ROUTER_SPECS, ids=label)
causal_routers = pytest.mark.parametrize("spec", where(lambda r: r.causal), ids=label)
losses = pytest.mark.parametrize("loss_name", sorted(BALANCE))
experts = pytest.mark.parametrize("expert", sorted(EXPERTS))
entries = pytest.mark.parametrize(("registry", "name"), ENTRIES, ids=label)
fields = pytest.mark.parametrize(("registry", "name", "field"), FIELDS, ids=label)
matrices = pytest.mark.parametrize("expert", [n for n in sorted(EXPERTS) if EXPERTS[n].bank.linear])
"""Expert types of which each expert is one matrix."""
ffn_experts = pytest.mark.parametrize(
    "expert", [n for n in sorted(EXPERTS) if EXPERTS[n]().refusal("ffn") is None]
)
"""Expert types that can span an FFN."""
shared = pytest.mark.parametrize("num_shared", [0, 2])
