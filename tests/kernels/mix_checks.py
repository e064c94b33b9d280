"""What must hold for the kernels of the FFN mixture, on any device: called by the tests.

Letters: T tokens, F width, K slots, E experts, R rank columns.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moeadapt.kernels.mix_activation import mix_activation
from moeadapt.kernels.reference import BASE, SHARED, mix_activation_reference

# Relative error in the norm. Inputs are rounded before the reference sees them.
TOLERANCE = {"float32": 3e-6, "float16": 2e-3, "bfloat16": 1.2e-2}
NAMES = ["gate", "up", "hidden_gate", "hidden_up", "b_gate", "b_up", "a_down", "weights"]


@dataclass(frozen=True)
class Case:
    """Sizes of one problem; `without` names a projection that has no experts."""

    k: int = 2
    dtype: str = "float32"
    tokens: int = 37
    width: int = 40
    rank: int = 3
    experts: int = 5
    shared: int = 1
    chunk: int | None = None
    without: str = ""


def owner_of(case: Case, projection: str) -> Tensor:
    """Return who owns the rank columns: experts in a mixed order, then the shared ones."""
    if case.without == projection:
        return torch.empty(0, dtype=torch.int64)
    routed = torch.arange(case.experts).repeat(case.rank)
    return torch.cat([routed, torch.full((case.shared * case.rank,), SHARED)])


def problem(device: str, case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors with gradients, in the order of `NAMES`, and the integer ones."""
    torch.manual_seed(0)
    owners = [owner_of(case, name) for name in ("gate", "up", "down")]
    g, u, r = (len(owner) for owner in owners)
    t, f = case.tokens, case.width
    shapes = [(t, f), (t, f), (t, g), (t, u), (f, g), (f, u), (r, f)]
    dtype = getattr(torch, case.dtype)
    tensors = [(0.5 * torch.randn(shape)).to(device, dtype) for shape in shapes]
    tensors.append(torch.randn(case.k, t).softmax(0).to(device))
    # Different experts in the slots of a token, some of them the base FFN.
    experts = torch.stack([torch.randperm(case.experts + 1)[: case.k] - 1 for _ in range(t)], 1)
    assert case.k == 1 or (experts == BASE).any()
    integers = [value.to(device) for value in (experts, *owners)]
    return [tensor.requires_grad_() for tensor in tensors], integers


def solve(function, tensors, integers, **options) -> dict[str, Tensor]:
    """Return the outputs and every gradient of a fixed readout of both outputs."""
    mix, gated = function(*tensors, *integers, **options)
    torch.manual_seed(1)
    readouts = [torch.randn(out.shape).to(out) for out in (mix, gated)]
    loss = sum((out * readout).sum() for out, readout in zip((mix, gated), readouts, strict=True))
    needed = [(n, t) for n, t in zip(NAMES, tensors, strict=True) if t.requires_grad]
    grads = torch.autograd.grad(loss, [tensor for _, tensor in needed])
    found = {f"d_{name}": grad for (name, _), grad in zip(needed, grads, strict=True)}
    return {"mix": mix, "gated": gated, **found}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Compare tensor by tensor, in the norm."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.shape == expected[name].shape, name
        error = (value.double() - expected[name].double()).norm().item()
        assert error <= tolerance * expected[name].double().norm().item(), (name, error)


def check_values(device: str, case: Case) -> None:
    """Outputs and gradients are those of the reference in double precision."""
    tensors, integers = problem(device, case)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    found = solve(mix_activation, tensors, integers, chunk=case.chunk)
    assert found["mix"].dtype == found["gated"].dtype == tensors[0].dtype
    assert found["d_weights"].dtype == torch.float32
    expected = solve(mix_activation_reference, exact, integers)
    assert_near(found, expected, TOLERANCE[case.dtype])


def check_columns_that_are_off(device: str, dtype: str) -> None:
    """What a column of an expert not chosen holds, infinity included, changes nothing."""
    tensors, integers = problem(device, Case(dtype=dtype, k=1))
    expert, owner = integers[0][0], integers[1]
    off = (owner != expert.unsqueeze(-1)) & (owner != SHARED)
    expected = solve(mix_activation, tensors, integers)
    for i in (2, 3):
        tensors[i] = tensors[i].detach().masked_fill(off, torch.inf).requires_grad_()
    found = solve(mix_activation, tensors, integers)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
    assert (found["d_hidden_gate"][off] == 0).all()


def check_experts_that_change_nothing(device: str, dtype: str) -> None:
    """Then all slots agree, and the mixture is one of them whatever the weights, bit by bit."""
    tensors, integers = problem(device, Case(dtype=dtype, k=4))
    tensors[4], tensors[5] = torch.zeros_like(tensors[4]), torch.zeros_like(tensors[5])
    mix, _ = mix_activation(*tensors, *integers)
    one = [*tensors[:7], tensors[7][:1]], [integers[0][:1], *integers[1:]]
    assert torch.equal(mix, mix_activation(*one[0], *one[1])[0])


def check_frozen_factors(device: str, dtype: str) -> None:
    """Factors that are not trained get no gradient; the other gradients stay what they were."""
    tensors, integers = problem(device, Case(dtype=dtype))
    expected = solve(mix_activation, tensors, integers)
    for i in (5, 6):
        tensors[i] = tensors[i].detach()
        del expected[f"d_{NAMES[i]}"]
    found = solve(mix_activation, tensors, integers)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert found.keys() == expected.keys()


def saved_for_backward(device: str, k: int) -> float:
    """Return what is kept for backward, factors not counted, in units of T * F elements."""
    case = Case(k=k, tokens=64, width=512, rank=1, shared=0)
    tensors, integers = problem(device, case)
    factors = {tensor.data_ptr() for tensor in tensors[4:7]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in factors:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mix_activation(*tensors, *integers)
    return sum(kept.values()) / (case.tokens * case.width)


def check_other_types(device: str, dtype: str) -> None:
    """Adapters in float32 on a base in `dtype` compute in `dtype`, with gradients in float32."""
    case = Case(dtype=dtype)
    tensors, integers = problem(device, case)
    expected = solve(mix_activation, tensors, integers)
    wide = [tensor.detach().float().requires_grad_() for tensor in tensors[2:7]]
    found = solve(mix_activation, [*tensors[:2], *wide, tensors[7]], integers)
    assert found["mix"].dtype == tensors[0].dtype
    assert found["d_b_gate"].dtype == torch.float32
    assert_near(found, expected, 0.0)


def check_refusal(device: str, dtype: str) -> str:
    """Return what is said about a type that the kernels do not compute in."""
    from moeadapt.errors import UnsupportedError

    tensors, integers = problem(device, replace(Case(), dtype=dtype))
    try:
        mix_activation(*tensors, *integers)
    except UnsupportedError as error:
        return str(error)
    return ""
