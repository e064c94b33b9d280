"""What a run measures: the sizes and the turns of each part."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch

from benchmarks.speed.arms import Shape
from benchmarks.speed.case import Sizes

HEADLINE = Sizes(1024, 1024, 1024, 8, 8, 2, torch.bfloat16)
DTYPES = (torch.bfloat16, torch.float32)
Rounds = tuple[int, int]
"""Turns of the step, turns of the decoding."""


@dataclass(frozen=True)
class Preset:
    """Sizes and turns.

    Attributes:
        linear: cells of one linear, and their turns.
        ffn: cells of one FFN, whose width is `Sizes.out`, and their turns.
        llama: models of random weights, and their turns.
        arms: the arms of the models; None: all.
        smollm2: tokens and turns of the real model; None: leave it out.
        imports: turns; 0: none.
    """

    linear: tuple[tuple[Sizes, int], ...]
    ffn: tuple[tuple[Sizes, int], ...]
    llama: tuple[tuple[Shape, Sizes, Rounds], ...]
    arms: tuple[str, ...] | None = None
    smollm2: tuple[int, Rounds] | None = None
    imports: int = 0


def _grid() -> Iterator[tuple[Sizes, int]]:
    for dtype in DTYPES:
        for experts, rank, k in product((4, 8, 16, 64), (4, 8, 16), (1, 2, 4)):
            sizes = replace(HEADLINE, experts=experts, rank=rank, k=k, dtype=dtype)
            headline = {8: 25, 64: 7}.get(experts, 3) if (rank, k) == (8, 2) else 3
            yield sizes, headline
        yield Sizes(1, 1024, 1024, 64, 16, 2, dtype), 15


def _ffn(tokens: int, width: int, ffn: int, rounds: int) -> Iterator[tuple[Sizes, int]]:
    for dtype, k in product(DTYPES, (2, 4)):
        yield Sizes(tokens, width, ffn, 8, 8, k, dtype), rounds


SMALL, MIDDLE = Shape(128, 344, 4), Shape(512, 1376, 4)
AT_64 = Sizes(64, 128, 128, 8, 8, 2)
AT_512 = Sizes(512, 512, 512, 8, 8, 2)

FULL = Preset(
    linear=tuple(_grid()),
    ffn=(*_ffn(512, 1024, 2816, 7), *_ffn(1024, 2048, 5632, 3)),
    llama=((SMALL, AT_64, (25, 7)), (MIDDLE, AT_512, (9, 5))),
    smollm2=(96, (3, 3)),
    imports=5,
)
QUICK = Preset(
    linear=((HEADLINE, 11), (replace(HEADLINE, experts=64), 3)),
    ffn=tuple(cell for cell in _ffn(512, 1024, 2816, 4) if cell[0].dtype == torch.bfloat16),
    llama=((SMALL, AT_64, (11, 3)), (MIDDLE, AT_512, (3, 1))),
    imports=1,
)
TOY = Preset(
    linear=((Sizes(70, 32, 32, 4, 8, 2), 2), (Sizes(70, 32, 32, 4, 8, 2, torch.bfloat16), 2)),
    ffn=((Sizes(16, 32, 48, 4, 8, 2), 2),),
    llama=((Shape(32, 48, 2, heads=2, kv_heads=2), Sizes(16, 32, 32, 4, 4, 2), (2, 2)),),
)

# --- on a GPU; nobody has run these yet

EIGHT_B = ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))
"""In and out of the linears of Llama-3-8B."""


def _gpu_linears() -> Iterator[tuple[Sizes, int]]:
    for (width, out), experts in product(EIGHT_B, (8, 64)):
        rank = 16 if experts == 8 else 8
        yield Sizes(8192, width, out, experts, rank, 2, torch.bfloat16, "cuda"), 15


GPU = Preset(
    linear=tuple(_gpu_linears()),
    ffn=tuple((Sizes(8192, 4096, 14336, 8, 16, k, torch.bfloat16, "cuda"), 9) for k in (2, 4)),
    llama=(
        (
            Shape(2048, 8192, 16, heads=32, kv_heads=8),
            Sizes(4096, 2048, 2048, 8, 16, 2, torch.bfloat16, "cuda"),
            (9, 3),
        ),
    ),
    arms=("base", "lora_r", "lora_kr", "lora_Nr", "ours_layer", "ours_block", "ours_ffn"),
    imports=3,
)
