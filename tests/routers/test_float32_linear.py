"""A linear map in float32 of bfloat16 tokens chooses as float64 does and never casts them.

Letters: T tokens, D width, W outputs.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from moeadapt.routers import float32_linear
from moeadapt.routers.float32_linear import float32_linear as linear
from moeadapt.routers.float32_linear import reads_uncast, split
from moeadapt.routing import select_top_k
from tests.routers.uncast import (
    BF16,
    ROUNDING,
    D,
    T,
    W,
    around,
    autocasts,
    devices,
    error,
    no_product,
    simulate,
    tensors,
)
from tests.structure.trace import names, recorded, saved_for_backward

TRUE_WIDTH = 4096


@pytest.fixture(autouse=True)
def _simulated(monkeypatch):
    torch.manual_seed(0)
    simulate(monkeypatch)


def exact(t: SimpleNamespace) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output and both gradients in float64."""
    x, weight = (v.detach().double().requires_grad_() for v in (t.x, t.weight))
    out = F.linear(x, weight)
    return out.detach(), *torch.autograd.grad(out, [x, weight], t.upstream.double())


# --- what it computes


@devices
@pytest.mark.parametrize("num_experts", [8, 64])
def test_every_token_chooses_as_in_float64(device, num_experts):
    t = tensors(device, 4096, TRUE_WIDTH, num_experts)
    with torch.no_grad():
        expected = select_top_k(F.linear(t.x.double(), t.weight.double()), 2)
        found = select_top_k(linear(t.x, t.weight), 2)
        rounded = select_top_k(F.linear(t.x.float(), t.weight.to(BF16).float()), 2)
    assert torch.equal(found, expected)
    assert not torch.equal(rounded, expected)


@devices
@autocasts
def test_logits_and_gradients_are_those_of_float64(device, autocast):
    t = tensors(device, 512, TRUE_WIDTH, 8)
    out, grad_x, grad_weight = exact(t)
    with around(autocast, device):
        found = linear(t.x, t.weight)
        found_x, found_weight = torch.autograd.grad(found, [t.x, t.weight], t.upstream)
    assert found.dtype == found_weight.dtype == torch.float32
    assert found_x.dtype == BF16
    assert error(found, out) < 1e-5
    assert error(found_weight, grad_weight) < 1e-5
    # Rounded once each: the gradient of the output, the weight and the result.
    assert error(found_x, grad_x) < 3 * ROUNDING


@autocasts
def test_autocast_changes_not_one_bit(autocast):
    t, runs = tensors(), []
    for kind in (None, autocast):
        with around(kind, "cpu"):
            out = linear(t.x, t.weight)
            runs.append([out, *torch.autograd.grad(out, [t.x, t.weight], t.upstream)])
    for value, other in zip(*runs, strict=True):
        assert torch.equal(value, other)


def test_a_weight_of_any_size_keeps_sixteen_bits():
    matrix = torch.randn(7, 30) * 10.0 ** torch.linspace(-30, 37, 30)
    high, low = split(matrix).chunk(2)
    wrong = (high.double() + low.double() - matrix.double()).abs()
    assert (wrong <= 2.0**-16 * matrix.double().abs()).all()
    assert (high.double() - matrix.double()).abs().max() > 2.0**-16 * matrix.abs().max()


def test_the_bias_is_added_and_trained_in_float32():
    t = tensors()
    bias = torch.randn(W, requires_grad=True)
    out = linear(t.x, t.weight, bias)
    assert_close(out, linear(t.x, t.weight) + bias)
    (found,) = torch.autograd.grad(out, [bias], t.upstream)
    assert_close(found, t.upstream.sum(0))


# --- what it costs


def structure(monkeypatch, t: SimpleNamespace) -> list:
    """Trace forward and backward with a GEMM that computes nothing."""
    monkeypatch.setattr(float32_linear, "product", no_product)
    with recorded() as kernels:
        wanted = [v for v in (t.x, t.weight) if v.requires_grad]
        torch.autograd.grad(linear(t.x, t.weight), wanted, t.upstream)
    return kernels


def test_tokens_are_never_cast(monkeypatch):
    kernels = structure(monkeypatch, tensors())
    large = [k for k in kernels if k.size >= T * D]
    assert [k.name for k in large] == ["mm"]  # the gradient of x
    assert all(out.dtype == BF16 for k in large for out in k.outputs)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_what_needs_no_gradient_costs_none_and_keeps_nothing(monkeypatch, frozen):
    t = tensors()
    getattr(t, frozen).requires_grad_(False)
    kept = saved_for_backward(lambda: linear(t.x, t.weight), [])
    assert [v.numel() for v in kept] == [T * D if frozen == "x" else 2 * W * D]
    products = [k for k in structure(monkeypatch, t) if k.name == "mm"]
    assert len(products) == (0 if frozen == "x" else 1)


def test_training_keeps_only_the_tokens_themselves_and_the_parts_of_the_weight():
    t = tensors()
    kept = saved_for_backward(lambda: linear(t.x, t.weight), [t.x])
    assert [(v.dtype, v.numel()) for v in kept] == [(BF16, 2 * W * D)]


def test_without_gradients_no_function_is_called(monkeypatch):
    def refuse(*args):
        raise AssertionError("a Function costs time in generation")

    t = tensors()
    trained = linear(t.x, t.weight)
    monkeypatch.setattr(float32_linear._Linear, "apply", refuse)
    with torch.no_grad():
        assert torch.equal(linear(t.x, t.weight), trained)
    assert torch.equal(linear(t.x.detach(), t.weight.detach()), trained)


def test_torch_has_the_product(monkeypatch):
    """On the meta device: the real call, its shapes and its dtype, without a GPU."""
    monkeypatch.undo()
    monkeypatch.setattr(float32_linear, "has_product", lambda x: True)
    # The meta device has no autocast to switch off.
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    x = torch.empty(T, D, dtype=BF16, device="meta", requires_grad=True)
    weight = torch.empty(W, D, device="meta", requires_grad=True)
    with recorded() as kernels:
        out = linear(x, weight)
        grad_x, grad_weight = torch.autograd.grad(out.sum(), [x, weight])
    assert (out.dtype, out.shape) == (torch.float32, (T, W))
    assert (grad_x.dtype, grad_x.shape) == (BF16, (T, D))
    assert (grad_weight.dtype, grad_weight.shape) == (torch.float32, (W, D))
    assert names(kernels).count("mm") == 3
    assert not [k for k in kernels if k.name == "_to_copy" and k.size == T * D]


# --- where it casts


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_other_tokens_are_promoted(dtype):
    x, weight = torch.randn(T, D).to(dtype), torch.randn(W, D)
    assert not reads_uncast(x, weight)
    wide = torch.promote_types(dtype, torch.float32)
    assert torch.equal(linear(x, weight), F.linear(x.to(wide), weight.to(wide)))


def test_few_tokens_are_cast(monkeypatch):
    x, weight = torch.randn(2 * W + 1, D).to(BF16), torch.randn(W, D)
    assert reads_uncast(x, weight)
    assert not reads_uncast(x[1:], weight)
    with recorded() as kernels:
        linear(x[1:], weight)
    assert names(kernels) == ["_to_copy", "mm"]


def test_the_cpu_casts(monkeypatch):
    monkeypatch.undo()
    x, weight = torch.randn(T, D).to(BF16), torch.randn(W, D)
    assert not reads_uncast(x, weight)
    assert torch.equal(linear(x, weight), F.linear(x.float(), weight))


# --- under the compiler


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
@devices
@autocasts
def test_it_is_one_graph(device, autocast):
    torch._dynamo.reset()
    t = tensors(device)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        with around(autocast, device):
            return linear(x, weight)

    compiled = torch.compile(
        run, backend="inductor" if device == "cuda" else "aot_eager", fullgraph=True
    )
    results = []
    for call in (run, compiled):
        out = call(t.x, t.weight)
        results.append([out, *torch.autograd.grad(out, [t.x, t.weight], t.upstream)])
    for value, other in zip(*results, strict=True):
        assert value.dtype == other.dtype
        assert_close(value, other)
    with torch.no_grad():
        assert_close(compiled(t.x, t.weight), run(t.x, t.weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_of_half_tokens_is_not_kept_and_gradients_are_those_of_the_cast(dtype, monkeypatch):
    monkeypatch.setattr(float32_linear, "has_product", lambda x: False)
    x = torch.randn(T, D).to(dtype).requires_grad_()
    weight, bias = torch.randn(W, D, requires_grad=True), torch.randn(W, requires_grad=True)
    upstream = torch.randn(T, W)
    kept = saved_for_backward(lambda: linear(x, weight, bias), [x, weight, bias])
    assert not [tensor for tensor in kept if tensor.numel() == x.numel()]
    y = linear(x, weight, bias)
    slow = x.float() @ weight.T + bias
    assert_close(y, slow)
    inputs = (x, weight, bias)
    found, expected = (torch.autograd.grad(out, inputs, upstream) for out in (y, slow))
    for mine, theirs in zip(found, expected, strict=True):
        assert_close(mine, theirs)
