"""One linear: the experts alone, forward, and forward with backward; the base output is given.

Letters: T tokens, D in, O out, N experts, r rank of one, K experts per token.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.speed.case import Form, LinearCase, Sizes
from benchmarks.speed.forms import OURS, PEERS, PLAIN, available
from benchmarks.speed.gate import check_linear
from benchmarks.speed.measure import Measured, in_turns, peak_bytes, saved_bytes

UNIT = "T*D"


def forms_of(case: LinearCase) -> dict[str, Form]:
    """Return every form that is timed for these sizes, the plain LoRAs first."""
    sizes = case.sizes
    ranks = {"lora_r": sizes.rank, "lora_kr": sizes.k * sizes.rank}
    forms = {}
    for name, rank in {**ranks, "lora_Nr": sizes.experts * sizes.rank}.items():
        plain = LinearCase.random(replace(sizes, experts=1, rank=rank, k=1))
        forms[name] = PLAIN["lora"](plain)
    for name, make in {**OURS, **PEERS}.items():
        # In float32 it is `loop_sparse`.
        same = name == "loop_sparse_fp32" and sizes.dtype == torch.float32
        if available(name, case) and not same:
            forms[name] = make(case)
    return forms


def check(cells: Iterable[tuple[Sizes, int]]) -> list[str]:
    """Compare every form with its definition at the experts, ranks and k of `cells`."""
    sizes = [cell for cell, _ in cells]
    shapes = sorted({(s.experts, s.rank, s.k) for s in sizes})
    device = sizes[0].device if sizes else "cpu"
    return check_linear({**OURS, **PEERS, **PLAIN}, shapes, device=device)


def measure(sizes: Sizes, rounds: int) -> list[Measured]:
    """Time one cell; returns its forward and its forward with backward."""
    case = LinearCase.random(sizes)
    forms = forms_of(case)
    common: dict[str, Any] = {
        "benchmark": "linear",
        "sizes": sizes.named(),
        "baseline": "lora_Nr",
        "ours": "ours_auto",
    }
    with torch.no_grad():
        alone = in_turns({n: f.run for n, f in forms.items()}, rounds, sizes.device)
    steps = {name: step_of(form, case) for name, form in forms.items()}
    both = in_turns(steps, rounds, sizes.device)
    unit = sizes.tokens * sizes.width * case.x.element_size()
    known = [case.onto, case.upstream, case.slots, case.choice]
    saved = {n: saved_bytes(f.run, [*known, *f.leaves, *f.known]) / unit for n, f in forms.items()}
    peak = {name: peak_bytes(step) / unit for name, step in steps.items()}
    return [
        Measured(work="forward", seconds=alone, **common),
        Measured(
            work="forward+backward", seconds=both, unit=UNIT, saved=saved, peak=peak, **common
        ),
    ]


def step_of(form: Form, case: LinearCase) -> Callable[[], None]:
    """Return what runs forward and backward of `form` once."""

    def step() -> None:
        torch.autograd.grad(form.run(), form.leaves, case.upstream)

    return step
