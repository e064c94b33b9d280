"""Experts that span an FFN: the base matrices are multiplied once per token, whatever k."""

import pytest
import torch
from torch import nn

import moeadapt
from tests.structure.trace import MATRIX_PRODUCTS, SYNCHRONISING, Kernel, names, recorded
from tests.tiny import HIDDEN, adapted

T, E, RANK = 101, 5, 3
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

routed_k = pytest.mark.parametrize("k", [1, 2, 4])


def ffn_of(k: int) -> nn.Module:
    """Return the FFN of a small Llama with experts that use k per token."""
    model = adapted(
        "llama",
        "ffn",
        num_experts=E,
        r=RANK,
        router={"name": "top_k", "k": k, "init_std": 0.5},
        balance={"switch": 0.1},
    ).train()
    moeadapt.set_aux_loss_scale(model, 1.0)
    return model.base_model.model.model.layers[0].mlp


def products_with(weight: torch.Tensor, kernels: list[Kernel]) -> list[Kernel]:
    """Return the matrix products that read `weight`."""
    memory = weight.untyped_storage().data_ptr()
    return [
        kernel
        for kernel in kernels
        if kernel.name in MATRIX_PRODUCTS
        and any(t.untyped_storage().data_ptr() == memory for t in kernel.inputs)
    ]


@routed_k
def test_each_base_matrix_is_multiplied_once_forward_and_once_backward(k):
    ffn = ffn_of(k)
    x = torch.randn(1, T, HIDDEN, requires_grad=True)
    with recorded() as forward:
        y = ffn(x)
    with recorded() as backward:
        y.sum().backward()
    for name in PROJECTIONS:
        weight = getattr(ffn, name).base_layer.weight
        for kernels in (forward, backward):
            (product,) = products_with(weight, kernels)
            rows = product.outputs[0].numel() // product.outputs[0].shape[-1]
            assert rows == T


@routed_k
def test_an_ffn_never_waits_for_the_device(k):
    ffn = ffn_of(k)
    x = torch.randn(1, T, HIDDEN, requires_grad=True)
    with recorded() as kernels:
        ffn(x).sum().backward()
    assert not SYNCHRONISING & set(names(kernels))


@routed_k
def test_the_number_of_kernels_does_not_depend_on_k(k):
    def count(slots: int) -> tuple[int, int]:
        ffn, x = ffn_of(slots), torch.randn(1, T, HIDDEN, requires_grad=True)
        ffn(x).sum().backward()  # makes the counters
        with recorded() as forward:
            y = ffn(x)
        with recorded() as backward:
            y.sum().backward()
        return len(forward), len(backward)

    if k == 1:  # its weights do not sum to one, so the base FFN takes a slot of its own
        return
    assert count(k) == count(3)


@routed_k
def test_no_tensor_is_larger_than_the_slots(k):
    ffn = ffn_of(k)
    width = ffn.gate_proj.out_features
    x = torch.randn(1, T, HIDDEN, requires_grad=True)
    with recorded() as kernels:
        ffn(x).sum().backward()
    slots = k if k > 1 else 2
    assert max(kernel.size for kernel in kernels) == slots * T * width
