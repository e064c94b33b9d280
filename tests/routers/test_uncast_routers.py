"""Routers read a bfloat16 hidden state as it is, in a model too.

Letters: T tokens, D width, W outputs.
"""

import pytest
import torch
from torch import Tensor

import moeadapt
from moeadapt.routers import ROUTERS, float32_linear
from moeadapt.routers.float32_linear import reads_uncast
from moeadapt.routing import TokenContext
from tests.routers.uncast import BF16, ROUNDING, D, T, W, devices, error, gpu, no_product, simulate
from tests.structure.trace import recorded
from tests.tiny import adapted, batch


@pytest.fixture(autouse=True)
def _simulated(monkeypatch):
    torch.manual_seed(0)
    simulate(monkeypatch)


SPECS = [
    {"name": "top_k", "bias": True, "temperature": 0.5},
    {"name": "top_k", "noise": "softplus"},
    {"name": "top_k", "jitter": 0.1},
    {"name": "top_k", "input": "stop_gradient"},
    {"name": "hierarchical"},
    {"name": "cosine"},
    {"name": "sigmoid"},
    {"name": "sparsegen"},
    {"name": "threshold", "learned": True},
]


def routed(spec, monkeypatch, *, uncast: bool) -> dict[str, Tensor]:
    """Route bfloat16 tokens in training; return what comes out and every gradient."""
    monkeypatch.setattr(float32_linear, "has_product", lambda x: uncast)
    torch.manual_seed(0)
    router = ROUTERS.parse(spec).build(D, W - 1).train()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(T, D).to(BF16).requires_grad_()
    routing = router(x, TokenContext())
    total = (routing.weights * torch.randn(T, W - 1)).sum()
    leaves = {"x": x, **dict(router.named_parameters())}
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    found = {n: g for n, g in zip(leaves, grads, strict=True) if g is not None}
    return {"logits": routing.logits.detach(), "weights": routing.weights.detach(), **found}


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: "-".join(map(str, s.values())))
def test_a_router_routes_and_trains_as_after_a_cast(spec, monkeypatch):
    expected = routed(spec, monkeypatch, uncast=False)
    found = routed(spec, monkeypatch, uncast=True)
    assert found.keys() == expected.keys()
    assert ("x" in found) == (spec.get("input") != "stop_gradient")
    differs = False
    for name, value in expected.items():
        limit = 3 * ROUNDING if name == "x" else ROUNDING / 4
        assert error(found[name], value.double()) < limit, name
        differs |= not torch.equal(found[name], value)
    assert differs


@pytest.mark.parametrize("norm", ["none", "rms", "standardize"])
def test_only_a_norm_casts_the_tokens(norm, monkeypatch):
    calls = []
    product = float32_linear.product
    spied = lambda a, b: (calls.append(a.shape), product(a, b))[1]  # noqa: E731
    monkeypatch.setattr(float32_linear, "product", spied)
    router = ROUTERS.parse({"name": "top_k", "norm": norm}).build(D, W)
    router(torch.randn(T, D).to(BF16), TokenContext())
    assert len(calls) == (1 if norm == "none" else 0)


# --- in a model


def model_in_bfloat16(device: str) -> torch.nn.Module:
    """Return a model in training with a router per linear; its routers stay float32."""
    model = adapted("llama", "layer", balance={"switch": 0.1, "z_loss": 0.1}).to(device, BF16)
    moeadapt.set_aux_loss_scale(model, 1.0)
    return model.train()


@devices
def test_no_kernel_of_a_layer_casts_the_hidden_state(device, monkeypatch):
    if device == "cpu":
        monkeypatch.setattr(float32_linear, "product", no_product)
    layer = model_in_bfloat16(device).base_model.model.model.layers[0].self_attn.q_proj
    tokens = 1009  # a prime: nothing else has as many elements
    x = torch.randn(tokens, layer.in_features, dtype=BF16, device=device, requires_grad=True)
    layer(x).sum().backward()  # makes the counters
    with recorded() as kernels:
        layer(x).sum().backward()
    assert x.grad is not None
    assert not [k for k in kernels if k.name == "_to_copy" and k.size == x.numel()]


@gpu[0]
@gpu[1]
def test_a_step_never_waits_for_the_gpu(monkeypatch):
    monkeypatch.undo()
    model = model_in_bfloat16("cuda")
    ids = batch(1, 32)["input_ids"].to("cuda")
    assert reads_uncast(torch.empty(32, D, dtype=BF16, device="cuda"), torch.empty(4, D))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()

    step()  # first uses allocate and send constants
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
