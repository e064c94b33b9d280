"""Checks forms against the slow definition of the library, values and gradients, before any timing.

The numbers are drawn so that float64, float32 and bfloat16 hold exactly the same ones; the
definition is computed in float64. An error is the largest difference over the largest entry.

Letters: T tokens, D in, O out, N experts, r rank of one, R = N * r, K experts per token.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from benchmarks.speed.case import Form, LinearCase, Sizes, canonical
from benchmarks.speed.forms import available, make_bank
from moeadapt.dispatch import dispatch_reference

TOLERANCES = {torch.float64: 1e-10, torch.float32: 3e-5, torch.bfloat16: 5e-2}
"""Largest relative error allowed; bfloat16 has 8 bits, and sums of rounded products."""

TOKENS, WIDTH, OUT = 67, 32, 24
"""Small, and enough tokens that a form chosen by their number is the timed one."""


def error_of(found: Tensor, true: Tensor) -> float:
    """Return the largest difference over the largest entry of `true`."""
    found, true = found.detach().double(), true.detach().double()
    if found.shape != true.shape:
        return float("inf")
    difference = (found - true).abs().max() / true.abs().max().clamp(min=1e-30)
    return float(difference.nan_to_num(float("inf")))


def gradients_of(form: Form, upstream: Tensor) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """Return the output and the gradients by meaning."""
    y = form.run()
    flat = iter(torch.autograd.grad(y, form.leaves, upstream))
    lists = {
        name: [next(flat) for _ in (value if isinstance(value, list) else [value])]
        for name, value in form.inputs.items()
    }
    return y, lists


def definition(case: LinearCase, own: Callable[[Tensor], Tensor] | None) -> dict[str, Tensor]:
    """Return output and gradients of `dispatch_reference`; `own`: a routing computed from x."""
    bank = make_bank(case)
    a, b = bank.factor("lora_A").weight, bank.factor("lora_B").weight
    x = case.x.detach().clone().requires_grad_()
    given = case.dense_weights().requires_grad_()
    weights = own(x) if own else given
    y = dispatch_reference(x, weights, bank, case.onto)
    inputs = [x, a, b] if own else [x, a, b, given]
    gradients = torch.autograd.grad(y, inputs, case.upstream)
    names = ["x", "A", "B"] if own else ["x", "A", "B", "weights"]
    by_name = {name: [gradient] for name, gradient in zip(names, gradients, strict=True)}
    return {"output": y.detach(), **canonical(by_name, case)}


def check_linear(
    makers: dict[str, Callable[[LinearCase], Form]],
    shapes: Iterable[tuple[int, int, int]],
    dtypes: Iterable[torch.dtype] = tuple(TOLERANCES),
    device: str = "cpu",
) -> list[str]:
    """Compare every form with the definition.

    Args:
        makers: the forms.
        shapes: (experts, rank, k) of each case.
        dtypes: to check in; a form is checked in those that it can compute in.
        device: where.

    Returns:
        One line per form and dtype that is off; empty: all agree.
    """
    wrong = []
    for experts, rank, k in shapes:
        sizes = Sizes(TOKENS, WIDTH, OUT, experts, rank, k, torch.bfloat16, device)
        rounded = LinearCase.random(sizes)
        exact = rounded.to(torch.float64)
        given = definition(exact, None)
        for name, make in makers.items():
            for dtype in dtypes:
                case = rounded.to(dtype)
                if available(name, case):
                    where = f"{name} N={experts} r={rank} k={k} {str(dtype)[6:]}"
                    wrong += _compare(where, make(case), case, exact, given)
    return wrong


def _compare(
    where: str, form: Form, case: LinearCase, exact: LinearCase, given: dict[str, Tensor]
) -> list[str]:
    dtype = case.sizes.dtype
    if torch.finfo(form.exact_dtype).eps > torch.finfo(dtype).eps:
        return []
    if form.routing == "own" and dtype == torch.bfloat16:
        return []  # its choice of experts may differ from that of unrounded numbers
    true = given
    if form.routing == "own":
        true = definition(exact, form.weights)
    elif form.routing == "none":
        true = definition(exact.merged(), lambda x: x.new_ones(len(x), 1))
    with torch.no_grad():
        alone = {"output": form.run()}
    y, gradients = gradients_of(form, case.upstream)
    found = {"output": y, **canonical(gradients, case)}
    return [
        *differences(f"{where} without grad", alone, true, dtype),
        *differences(where, found, true, dtype),
    ]


def differences(
    where: str, found: dict[str, Tensor], true: dict[str, Tensor], dtype: torch.dtype
) -> list[str]:
    """Return one line per tensor of `found` that is further from `true` than `dtype` excuses."""
    return [
        f"{where}: {what} is off by {error:.1e}, allowed {TOLERANCES[dtype]:.0e}"
        for what, tensor in found.items()
        if not (error := error_of(tensor, true[what])) <= TOLERANCES[dtype]
    ]
