"""What linears that read one input cost together, counted in kernels and bytes.

Letters: T tokens, D in, E experts, R = experts * rank.
"""

import contextlib

import pytest
import torch

import moeadapt
from tests.structure.trace import (
    MATRIX_PRODUCTS,
    SYNCHRONISING,
    names,
    recorded,
    saved_for_backward,
)
from tests.tiny import HIDDEN, adapted

T, D, E, RANK, K = 1009, HIDDEN, 8, 8, 2
R = E * RANK
BLOCKS = {
    "self_attn": ("q_proj", "k_proj", "v_proj"),
    "mlp": ("gate_proj", "up_proj"),
}
blocks = pytest.mark.parametrize("name", BLOCKS)
precisions = pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])


class Run:
    """One forward and backward of the linears that read a block's input."""

    def __init__(self, name: str, precision: str = "float32", **fields) -> None:
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        router = {"name": "top_k", "k": K, "init_std": 0.5}
        fields = {"num_experts": E, "r": RANK, "router": router, **fields}
        model = adapted("llama", "block", balance={"switch": 0.1}, **fields).train()
        moeadapt.set_aux_loss_scale(model, 1.0)
        parent = model.base_model.model.model.layers[0].get_submodule(name)
        self.layers = [getattr(parent, linear) for linear in BLOCKS[name]]
        for layer in self.layers:
            layer.base_layer.to(dtype)
        block = self.layers[0].moe_blocks["default"]
        x = torch.randn(1, T, D, dtype=dtype, requires_grad=True)
        auto = precision == "autocast"
        around = torch.autocast("cpu", torch.bfloat16) if auto else contextlib.nullcontext()

        def forward():
            block.enter(parent, (x,), {})
            weights = block.routing("default").weights
            with recorded() as self.forward:
                outputs = [layer(x) for layer in self.layers]
            return weights, outputs

        with around:
            forward()  # makes the counters
            weights, outputs = forward()
            upstream = [torch.randn_like(y) for y in outputs]
            with recorded() as self.backward:
                factors = [p for n, p in self.layers[0].named_parameters() if "lora" in n]
                torch.autograd.grad(outputs, [x, weights, *factors], upstream)
            block.enter(parent, (x,), {})
            known = [x, block.routing("default").weights]
            known += [p for layer in self.layers for p in layer.parameters()]
            self.saved = saved_for_backward(lambda: [layer(x) for layer in self.layers], known)
        self.itemsize = 2 if dtype == torch.bfloat16 or auto else 4

    def work(self, kernels) -> list[str]:
        """Leave out what works on weights [T, E] and on matrices, which is small."""
        return [kernel.name for kernel in kernels if kernel.size % T == 0 and kernel.size != T * E]


@blocks
@precisions
def test_one_product_reads_the_input_for_all(name, precision):
    run = Run(name, precision)
    count = len(run.layers)
    products = [k for k in run.forward if k.name in MATRIX_PRODUCTS]
    assert [k.size for k in products].count(T * count * R) == 1
    assert len(products) == 2 * count + 1  # base and B of each, one A


@blocks
@precisions
def test_kernels_per_linear(name, precision):
    run = Run(name, precision)
    count = len(run.layers)
    assert len(run.work(run.forward)) <= 4 * count, names(run.forward)
    assert len(run.work(run.backward)) <= 12 * count, names(run.backward)
    assert not SYNCHRONISING & {*names(run.forward), *names(run.backward)}


@blocks
@precisions
def test_the_input_is_cast_once_for_all_and_only_under_autocast(name, precision):
    run = Run(name, precision)
    casts = sum(k.name == "_to_copy" and k.size == T * D for k in run.forward)
    assert casts == (1 if precision == "autocast" else 0)


@blocks
@precisions
def test_little_more_than_twice_the_rank_axis_is_kept_for_backward(name, precision):
    """Of rank 8 too, where the routing weights weigh an eighth of the rank axis."""
    run = Run(name, precision)
    rows = [t for t in run.saved if t.numel() % T == 0 and t.numel() != T * D]
    size = sum(t.untyped_storage().nbytes() for t in rows)
    assert size / (T * D * run.itemsize) <= 2.1 * len(run.layers) * R / D


@blocks
def test_with_dropout_each_linear_reads_for_itself(name):
    run = Run(name, lora_dropout=0.5)
    products = [k.size for k in run.forward if k.name in MATRIX_PRODUCTS]
    assert products.count(T * R) >= len(run.layers)
    assert T * R * len(run.layers) not in products
