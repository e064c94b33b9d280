"""The whole model in one graph: `torch.compile(fullgraph=True)` computes what eager does.

Run apart from the rest, since dynamo cannot trace the run-time shape checks:
`pytest tests/peft/test_compile.py -o addopts="" --import-mode=importlib`.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from moeadapt import set_aux_loss_scale
from moeadapt.tuner.inspect import pop_router_stats, prepare_stats
from tests.tiny import KINDS, adapted, batch, labels_of

pytestmark = [
    pytest.mark.compile,
    # Dynamo itself instantiates every autograd function that it traces.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

CASES = [(name, kind) for name in ("llama", "gpt2", "opt") for kind in KINDS]
BALANCE = {"switch": 0.5, "z_loss": 0.1}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _model(name: str, kind: str, **overrides: Any) -> PeftModel:
    model = adapted(name, kind, balance=BALANCE, **overrides).double()
    model.config.use_cache = False
    return model


def _compiled(model: PeftModel) -> Any:
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def _gradients(model: PeftModel, call: Any) -> dict[str, Tensor]:
    """Back-propagate through `call`; the loss is outside, since GPT-2's own breaks the graph."""
    model.zero_grad()
    scores = call(**batch()).logits[:, :-1].flatten(0, 1)
    cross_entropy(scores, labels_of(batch())[:, 1:].flatten()).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_compiled_model_has_eagers_outputs_gradients_and_counts(name: str, kind: str) -> None:
    eager, model = _model(name, kind).train(), _model(name, kind).train()
    for each in (eager, model):
        set_aux_loss_scale(each, 0.5)
        prepare_stats(each, torch.device("cpu"))
    expected, found = _gradients(eager, eager), _gradients(model, _compiled(model))
    assert found.keys() == expected.keys()
    for parameter in expected:
        assert_close(found[parameter], expected[parameter])
    wanted, counted = pop_router_stats(eager), pop_router_stats(model)
    assert counted.keys() == wanted.keys() != set()
    for router in wanted:
        assert counted[router].tokens == wanted[router].tokens
        assert_close(counted[router].load, wanted[router].load)
        assert_close(counted[router].losses, wanted[router].losses, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_aux_scale_takes_effect_without_recompiling(kind: str) -> None:
    model = _model("llama", kind).train()
    prepare_stats(model, torch.device("cpu"))
    set_aux_loss_scale(model, 1.0)
    compiled = _compiled(model)
    first = {n: g.clone() for n, g in _gradients(model, compiled).items()}
    with torch._dynamo.config.patch(error_on_recompile=True):
        set_aux_loss_scale(model, 4.0)
        second = _gradients(model, compiled)
    routers = [n for n in first if "router" in n]
    assert routers
    assert all(not torch.allclose(first[n], second[n]) for n in routers)


ROUTERS = {
    "layer": "uniform",
    "block": {"name": "random"},
    "ffn": {"name": "top_k", "k": 1},
    "glu": {"name": "top_k", "k": 1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_routers_and_shared_experts_compile(kind: str) -> None:
    eager, model = (_model("llama", kind, router=ROUTERS[kind], n_shared=1) for _ in range(2))
    with torch.no_grad():
        assert_close(_compiled(model)(**batch()).logits, eager(**batch()).logits)
