"""What one linear with experts costs, counted in kernels and bytes instead of timed.

Letters: T tokens, D in, O out, E experts, R = experts * rank.
"""

import contextlib

import pytest
import torch
from torch import Tensor

import moeadapt
from moeadapt.tuner.layer import MoeLoraLinear
from tests.structure.trace import SYNCHRONISING, Kernel, names, recorded, saved_for_backward
from tests.tiny import HIDDEN, adapted, batch, labels_of

# Sizes whose products differ, so that a tensor is known by its number of elements.
T, D, E, RANK, K = 1009, HIDDEN, 5, 17, 3
R = E * RANK
LINEARS = {"self_attn.q_proj": 32, "self_attn.k_proj": 16, "mlp.gate_proj": 64}
FORWARD, BACKWARD, SAVED = 4, 12, 2.1

# dtype of the base and of the hidden states, autocast.
PRECISIONS = {
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "autocast": (torch.float32, True),
    "bfloat16_autocast": (torch.bfloat16, True),
}
linears = pytest.mark.parametrize("name", LINEARS)
precisions = pytest.mark.parametrize("precision", PRECISIONS)


class Run:
    """One forward and backward of one layer whose routing is that of its block."""

    def __init__(self, name: str, precision: str) -> None:
        dtype, autocast = PRECISIONS[precision]
        self.out = LINEARS[name]
        self.layer = shared_layer(name, dtype)
        x = torch.randn(T, D, dtype=dtype, requires_grad=True)
        around = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
        block = self.layer.moe_blocks["default"]
        with around:
            block.enter(self.layer, (x.detach(),), {})
            with recorded() as self.forward:
                y = self.layer(x)
            known = [x, block.routing("default").weights, *self.layer.parameters()]
            self.saved = saved_for_backward(lambda: self.layer(x), known)
        factors = [p for n, p in self.layer.named_parameters() if "lora" in n]
        upstream = torch.randn_like(y)
        with recorded() as self.backward:
            torch.autograd.grad(y, [x, block.routing("default").weights, *factors], upstream)
        self.unit = T * D * y.element_size()

    def launches(self, kernels: list[Kernel]) -> list[str]:
        """Leave out what works on the gate weights [T, E] and casts of matrices."""
        matrices = {R * D, R * self.out, D * self.out}
        return [
            kernel.name
            for kernel in kernels
            if kernel.size != T * E and not (kernel.name == "_to_copy" and kernel.size in matrices)
        ]

    def casts_of_tokens(self) -> int:
        """Count the casts of tensors as large as the input or the output, in the forward."""
        return sum(k.name == "_to_copy" and k.size in (T * D, T * self.out) for k in self.forward)


def shared_layer(name: str, dtype: torch.dtype) -> MoeLoraLinear:
    """Return a layer of a small Llama with experts in float32 on a base in `dtype`."""
    router = {"name": "top_k", "k": K, "init_std": 0.5}
    model = adapted("llama", "block", num_experts=E, r=RANK, router=router, balance={"switch": 0.1})
    layer = model.base_model.model.model.layers[0].get_submodule(name).train()
    layer.base_layer.to(dtype)
    return layer


@linears
@precisions
def test_a_linear_takes_four_forward_kernels(name, precision):
    run = Run(name, precision)
    casts = 1 if precision == "autocast" else 0  # stock linears cast their float32 input too
    assert len(run.launches(run.forward)) <= FORWARD + casts, names(run.forward)
    on_gate_weights = [kernel for kernel in run.forward if kernel.size == T * E]
    assert len(on_gate_weights) <= 2  # the scale and the cast


@linears
@precisions
def test_a_linear_takes_twelve_backward_kernels(name, precision):
    run = Run(name, precision)
    casts = 1 if precision == "autocast" else 0
    assert len(run.launches(run.backward)) <= BACKWARD + casts, names(run.backward)
    if precision == "float32":
        assert len(run.backward) <= BACKWARD, names(run.backward)


@linears
@precisions
def test_tokens_are_cast_once_under_autocast_and_never_otherwise(name, precision):
    run = Run(name, precision)
    assert run.casts_of_tokens() == (1 if precision == "autocast" else 0)


@linears
@precisions
def test_a_linear_never_waits_for_the_device_and_never_sorts(name, precision):
    run = Run(name, precision)
    assert not SYNCHRONISING & {*names(run.forward), *names(run.backward)}


@linears
@precisions
def test_no_tensor_has_an_expert_and_a_feature_axis(name, precision):
    run = Run(name, precision)
    sizes = {kernel.size for kernel in [*run.forward, *run.backward]}
    for features in (D, run.out):
        assert not {T * E * features, T * K * features} & sizes
    assert max(sizes) == max(T * D, T * run.out, T * R)


@linears
@precisions
def test_what_is_kept_for_backward_is_small(name, precision):
    run = Run(name, precision)
    itemsize = 4 if precision == "float32" else 2
    kept = [tensor for tensor in run.saved if tensor.numel() % T == 0]
    if precision == "autocast":  # a stock linear with a trained weight keeps its cast input too
        inputs = [tensor for tensor in kept if tensor.numel() == T * D]
        assert len(inputs) == 1
        kept = [tensor for tensor in kept if tensor is not inputs[0]]
    size = sum(bytes_of(tensor) for tensor in kept)
    assert size / run.unit <= SAVED * R / D
    assert size == (2 * R + E) * T * itemsize
    matrices = [tensor for tensor in run.saved if tensor.numel() % T]
    assert sum(bytes_of(tensor) for tensor in matrices) <= 2 * (R * D + R * run.out + D * run.out)


def bytes_of(tensor: Tensor) -> int:
    """Return the bytes of a tensor."""
    return tensor.numel() * tensor.element_size()


# --- the router


@pytest.mark.parametrize("kind", ["layer", "block", "ffn"])
@pytest.mark.parametrize("training", [True, False])
def test_a_model_waits_for_the_device_no_oftener_than_its_base(kind, training):
    model = adapted("llama", kind, balance={"switch": 0.1, "z_loss": 0.1}).train(training)
    moeadapt.set_aux_loss_scale(model, 1.0)
    inputs = {**batch(), "labels": labels_of(batch())}

    def waits() -> list[str]:
        with recorded() as kernels:
            loss = model(**inputs).loss
            if training:
                loss.backward()
        return [name for name in names(kernels) if name in SYNCHRONISING]

    found = waits()
    model.base_model.disable_adapter_layers()
    model.enable_input_require_grads()
    assert found == waits()


@pytest.mark.parametrize(("num_experts", "forward", "alone"), [(5, 40, 13), (61, 42, 15)])
def test_a_router_with_one_loss_and_its_counters_takes_few_kernels(num_experts, forward, alone):
    """`alone` is without loss and counters, as in generation; beyond 16 experts it depends on k."""
    model = adapted(
        "llama",
        "layer",
        num_experts=num_experts,
        router={"name": "top_k", "k": K},
        balance={"switch": 0.1},
    ).train()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    head = layer.moe_heads["default"]
    x = torch.randn(T, D)
    head(x)  # makes the counters
    with recorded() as training:
        head(x)
    with torch.no_grad(), recorded() as inference:
        head(x)
    assert len(training) <= forward, names(training)
    assert len(inference) <= alone, names(inference)
    pairs = T * num_experts * num_experts
    assert any(kernel.size == pairs for kernel in training) == (num_experts <= 16)
    assert not SYNCHRONISING & set(names(training))


def test_the_router_reads_its_input_once_in_float32():
    head = shared_layer("self_attn.q_proj", torch.float32).moe_blocks["default"]
    owner = head.owners["default"].moe_heads["default"]
    with recorded() as kernels:
        owner(torch.randn(T, D, requires_grad=True))
    assert sum(kernel.name == "mm" for kernel in kernels) == 1
    assert not [k for k in kernels if k.name == "_to_copy" and k.size == T * D]


def test_tensors_can_be_told_apart_by_their_number_of_elements():
    outs = set(LINEARS.values())
    named = [T * E, T * R, *(T * n * m for n in outs for m in (1, E, K))]
    named += [*(R * n for n in outs), *(D * n for n in outs)]
    assert len(set(named)) == len(named)
