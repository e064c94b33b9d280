"""One FFN with experts: base, experts and router, forward with backward.

Letters: T tokens, D width, F width of the FFN, N experts, r rank of one, K experts per token.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.speed.case import Form, Sizes
from benchmarks.speed.ffn_forms import FORMS, LINEARS, FfnCase, routed
from benchmarks.speed.gate import differences, gradients_of
from benchmarks.speed.measure import Measured, in_turns, peak_bytes, saved_bytes
from moeadapt.dispatch import ffn_reference

UNIT = "T*F"
TOKENS, WIDTH, FFN = 23, 32, 48
"""Sizes of the check."""


def canonical(gradients: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """Return gradients with all experts of a factor in one matrix, [R, in] or [out, R]."""
    return {
        name: torch.cat(tensors, 1 if name.startswith("B ") else 0)
        for name, tensors in gradients.items()
    }


def definition(case: FfnCase, whole: bool) -> dict[str, Tensor]:
    """Return output and gradients of `ffn_reference`; `whole`: one expert of rank R, always."""
    x, router = (t.clone().requires_grad_() for t in (case.x, case.router))
    a = {n: case.a[n].flatten(0, 1).requires_grad_() for n in LINEARS}
    b = {n: case.b[n].movedim(0, 1).flatten(1).requires_grad_() for n in LINEARS}
    experts, rank = case.sizes.experts, case.sizes.rank
    if whole:
        experts, rank = 1, experts * rank

    def linear(x: Tensor, name: str, expert: int | None) -> Tensor:
        y = F.linear(x, case.base[name])
        if expert is None:
            return y
        own = slice(expert * rank, (expert + 1) * rank)
        return y + F.linear(F.linear(x, a[name][own]), b[name][:, own]) * case.scale

    def ffn(x: Tensor, expert: int | None) -> Tensor:
        activation = F.silu(linear(x, "gate_proj", expert)) * linear(x, "up_proj", expert)
        return linear(activation, "down_proj", expert)

    weights = x.new_ones(len(x), 1)
    if not whole:
        choice, values = routed(x, router, case.sizes.k)
        weights = x.new_zeros(len(x), experts).scatter(1, choice, values)
    y = ffn_reference(x, weights, ffn)
    inputs = {"x": [x], **({} if whole else {"router": [router]})}
    inputs |= {f"A {n}": [a[n]] for n in LINEARS} | {f"B {n}": [b[n]] for n in LINEARS}
    flat = torch.autograd.grad(y, [t for ts in inputs.values() for t in ts], case.upstream)
    by_name = {name: [g] for name, g in zip(inputs, flat, strict=True)}
    return {"output": y.detach(), **canonical(by_name)}


def check(cells: Iterable[tuple[Sizes, int]]) -> list[str]:
    """Compare every form with the definition in every dtype, at each cell's experts."""
    wrong = []
    shapes = sorted({(s.experts, s.rank, s.k, s.device) for s, _ in cells})
    for experts, rank, k, device in shapes:
        # The numbers of the narrowest dtype, which the others hold exactly.
        sizes = Sizes(TOKENS, WIDTH, FFN, experts, rank, k, torch.bfloat16, device)
        rounded = FfnCase.random(sizes)
        exact = rounded.to(torch.float64)
        true = {whole: definition(exact, whole) for whole in (False, True)}
        for name, make in FORMS.items():
            for numbers in (exact, rounded.to(torch.float32), rounded):
                form = make(numbers)
                y, gradients = gradients_of(form, numbers.upstream)
                with torch.no_grad():
                    found = {"output": form.run()}
                where = f"ffn {name} N={experts} r={rank} k={k} {str(numbers.sizes.dtype)[6:]}"
                own, dtype = true[form.routing == "none"], numbers.sizes.dtype
                wrong += differences(f"{where} without grad", found, own, dtype)
                wrong += differences(where, {"output": y, **canonical(gradients)}, own, dtype)
    return wrong


def measure(sizes: Sizes, rounds: int) -> list[Measured]:
    """Time one cell, forward with backward."""
    case = FfnCase.random(sizes)
    forms = {name: make(case) for name, make in FORMS.items()}

    def step(form: Form) -> None:
        torch.autograd.grad(form.run(), form.leaves, case.upstream)

    steps = {name: (lambda form=form: step(form)) for name, form in forms.items()}
    seconds = in_turns(steps, rounds, sizes.device)
    unit = sizes.tokens * sizes.out * case.x.element_size()
    return [
        Measured(
            benchmark="ffn",
            work="forward+backward",
            sizes={**sizes.named(), "ffn": sizes.out, "out": sizes.width},
            seconds=seconds,
            baseline="lora_Nr",
            ours="ours",
            unit=UNIT,
            saved={
                n: saved_bytes(f.run, [case.upstream, *f.leaves, *f.known]) / unit
                for n, f in forms.items()
            },
            peak={name: peak_bytes(work) / unit for name, work in steps.items()},
        )
    ]
