"""One graph per model, without breaks, and the same gradients as eager."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import moeadapt
from moeadapt.tuner.inspect import pop_router_stats, prepare_stats
from tests.tiny import KINDS, adapted, batch, labels_of

pytestmark = [
    pytest.mark.compile,
    # dynamo itself instantiates autograd functions while it traces them
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
]

kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def model_of(kind: str) -> torch.nn.Module:
    """Return a model in training whose counters exist."""
    model = adapted("llama", kind, balance={"switch": 0.5, "z_loss": 0.25}).train()
    moeadapt.set_aux_loss_scale(model, 1.0)
    prepare_stats(model, torch.device("cpu"))
    return model


def step(run: torch.nn.Module, model: torch.nn.Module) -> dict[str, Tensor]:
    """Back-propagate once through `run`; return the gradients of `model`."""
    inputs = batch(rows=4)
    run(**inputs, labels=labels_of(inputs)).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@kinds
def test_one_graph_trains_and_counts_as_eager_does(kind):
    """`fullgraph=True` raises at the first graph break."""
    eager, compiled = model_of(kind), model_of(kind)
    expected = step(eager, eager)
    found = step(torch.compile(compiled, backend="aot_eager", fullgraph=True), compiled)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(found[name], value)
    counted, reference = pop_router_stats(compiled), pop_router_stats(eager)
    assert counted.keys() == reference.keys()
    real = int(batch(rows=4)["attention_mask"].sum())
    for name, stats in reference.items():
        assert counted[name].tokens == stats.tokens == real
        assert_close(counted[name].load, stats.load)


@kinds
def test_a_new_scale_is_followed_without_a_new_graph(kind):
    model = model_of(kind)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    first = step(compiled, model)
    model.zero_grad()
    with torch.compiler.set_stance("fail_on_recompile"):
        moeadapt.set_aux_loss_scale(model, 0.125)
        second = step(compiled, model)
    routers = [name for name in first if "moeadapt_router" in name]
    assert any((first[name] - second[name]).abs().max() > 1e-3 for name in routers)
    eager = model_of(kind)
    moeadapt.set_aux_loss_scale(eager, 0.125)
    for name, value in step(eager, eager).items():
        assert_close(second[name], value)


@kinds
def test_compiled_inference_is_eager_inference(kind):
    model, inputs = model_of(kind).eval(), batch(rows=4)
    with torch.no_grad():
        expected = model(**inputs).logits
        found = torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs).logits
    assert_close(found, expected)
