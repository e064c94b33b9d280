"""Experts that span an FFN: the base matrices are multiplied once per token, whatever k.

In both forms: `slots`, the FFN's own forward on a row per slot, and `whole`, which computes the
slots again in backward. The latter as on a GPU; a CPU may read sizes and sort.
"""

import pytest
import torch
from torch import nn

import moeadapt
from tests.structure.trace import (
    MATRIX_PRODUCTS,
    SYNCHRONISING,
    Kernel,
    names,
    recorded,
    saved_for_backward,
)
from tests.tiny import HIDDEN, adapted

T, E, RANK = 101, 5, 3
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

routed_k = pytest.mark.parametrize("k", [1, 2, 4])
forms = pytest.mark.parametrize("form", ["slots", "whole"])


def ffn_of(k: int, form: str, **fields) -> nn.Module:
    """Return the FFN of a small Llama with experts that use k per token."""
    fields = {"num_experts": E, "r": RANK, **fields}
    router = {"name": "top_k", "k": k, "init_std": 0.5}
    model = adapted("llama", "ffn", router=router, balance={"switch": 0.1}, **fields).train()
    moeadapt.set_aux_loss_scale(model, 1.0)
    ffn = model.base_model.model.model.layers[0].mlp
    if form == "slots":
        ffn.gate_proj.register_forward_hook(lambda *_: None)  # who looks at a slot gets to see it
    return ffn


def tokens() -> torch.Tensor:
    return torch.randn(1, T, HIDDEN, requires_grad=True)


def products_with(weight: torch.Tensor, kernels: list[Kernel]) -> list[Kernel]:
    """Return the matrix products that read `weight`."""
    memory = weight.untyped_storage().data_ptr()
    return [
        kernel
        for kernel in kernels
        if kernel.name in MATRIX_PRODUCTS
        and any(t.untyped_storage().data_ptr() == memory for t in kernel.inputs)
    ]


@forms
@routed_k
def test_each_base_matrix_is_multiplied_once_forward_and_once_backward(form, k):
    ffn, x = ffn_of(k, form), tokens()
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


@forms
@routed_k
def test_an_ffn_never_waits_for_the_device(form, k):
    ffn, x = ffn_of(k, form), tokens()
    ffn(x).sum().backward()  # sends whose each rank is to the device, once
    with recorded() as kernels:
        ffn(x).sum().backward()
    assert not SYNCHRONISING & set(names(kernels))


@pytest.mark.parametrize("k", [2, 4])  # with k=1 the base FFN takes a slot of its own
def test_the_number_of_kernels_of_slots_does_not_depend_on_k(k):
    def count(slots: int) -> tuple[int, int]:
        ffn, x = ffn_of(slots, "slots"), tokens()
        ffn(x).sum().backward()  # makes the counters
        with recorded() as forward:
            y = ffn(x)
        with recorded() as backward:
            y.sum().backward()
        return len(forward), len(backward)

    assert count(k) == count(3)


@forms
@routed_k
def test_no_tensor_is_larger_than_the_slots(form, k):
    ffn, x = ffn_of(k, form), tokens()
    with recorded() as kernels:
        ffn(x).sum().backward()
    slots = 1 if form == "whole" else max(k, 2)
    assert max(kernel.size for kernel in kernels) == slots * T * ffn.gate_proj.out_features


@routed_k
def test_a_whole_ffn_keeps_two_tensors_of_its_width(k):
    """Autograd keeps ten to twenty for the slots."""
    kept = {}
    for form in ("whole", "slots"):
        ffn, x = ffn_of(k, form, r=1), tokens()
        ffn(x)  # makes the counters
        known = [x, *ffn.parameters()]
        saved = saved_for_backward(lambda ffn=ffn, x=x: ffn(x), known)
        wide = T * ffn.gate_proj.out_features
        kept[form] = sum(t.untyped_storage().nbytes() for t in saved if t.numel() % wide == 0)
        kept[form] /= wide * 4
    assert kept["whole"] == 2
    assert kept["slots"] >= 8
