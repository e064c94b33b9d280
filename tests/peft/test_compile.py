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
from torch.testing import assert_close

from moeadapt import set_aux_loss_scale
from moeadapt.tuner.inspect import pop_router_stats, prepare_stats
from tests.tiny import KINDS, adapted, batch, gradients, labels_of

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


def _compiled_gradients(model: PeftModel, compiled: Any) -> dict[str, Tensor]:
    compiled(**batch(), labels=labels_of(batch())).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_compiled_model_has_eagers_outputs_and_gradients(name: str, kind: str) -> None:
    eager, model = _model(name, kind).train(), _model(name, kind).train()
    set_aux_loss_scale(eager, 0.5)
    set_aux_loss_scale(model, 0.5)
    expected = gradients(eager, batch())
    found = _compiled_gradients(model, _compiled(model))
    assert found.keys() == expected.keys()
    for parameter in expected:
        assert_close(found[parameter], expected[parameter])
    with torch.no_grad():
        assert_close(_compiled(model.eval())(**batch()).logits, eager.eval()(**batch()).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_model_counts_what_eager_counts(kind: str) -> None:
    eager, model = _model("llama", kind).train(), _model("llama", kind).train()
    gradients(eager, batch())
    prepare_stats(model, torch.device("cpu"))
    _compiled_gradients(model, _compiled(model))
    expected, found = pop_router_stats(eager), pop_router_stats(model)
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].tokens == expected[name].tokens
        assert_close(found[name].load, expected[name].load)
        assert_close(found[name].losses, expected[name].losses, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_scale_or_mask_recompiles_nothing(kind: str) -> None:
    model = _model("llama", kind).train()
    compiled = _compiled(model)
    prepare_stats(model, torch.device("cpu"))
    set_aux_loss_scale(model, 1.0)
    first = {n: g.clone() for n, g in _compiled_gradients(model, compiled).items()}
    with torch._dynamo.config.patch(error_on_recompile=True):
        model.zero_grad()
        set_aux_loss_scale(model, 4.0)
        second = _compiled_gradients(model, compiled)
    routers = [n for n in first if "router" in n]
    assert routers
    assert all(not torch.allclose(first[n], second[n]) for n in routers)


@pytest.mark.parametrize("router", ["uniform", {"name": "random"}, {"name": "top_k", "k": 1}])
@pytest.mark.parametrize("kind", KINDS)
def test_every_router_compiles(kind: str, router: Any) -> None:
    eager = _model("llama", kind, router=router, n_shared=1)
    model = _model("llama", kind, router=router, n_shared=1)
    with torch.no_grad():
        assert_close(_compiled(model)(**batch()).logits, eager(**batch()).logits)
