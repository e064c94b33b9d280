"""One linear with experts as numbers, and what a form of computing it is.

Letters: T tokens, D in, O out, N experts, r rank of one, R = N * r, K experts per token.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

Inputs = dict[str, Tensor | list[Tensor]]


@dataclass(frozen=True)
class Sizes:
    """The sizes of one linear with experts, written T, D, O, N, r, K in the tables."""

    tokens: int
    width: int
    out: int
    experts: int
    rank: int
    k: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def named(self) -> dict[str, int | str]:
        """Return them for a table."""
        dtype = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float64: "fp64"}[self.dtype]
        return {
            "tokens": self.tokens,
            "width": self.width,
            "out": self.out,
            "experts": self.experts,
            "rank": self.rank,
            "k": self.k,
            "dtype": dtype,
        }


@dataclass
class Form:
    """One way of computing it.

    Attributes:
        run: computes the output.
        inputs: what gradients are taken of, by meaning: `x` [T, D]; `weights` [T, N] or `slots`
            [T, K]; `A`, all ranks first [R, D] or one [r, D] per expert; `B` [O, R] or one [O, r]
            per expert.
        routing: `given`: it takes the case's; `own`: it routes by itself, as `weights` says;
            `none`: it is one expert of rank R.
        weights: the routing [T, N] as a differentiable function of `x`, if it is the form's own.
        known: other tensors that exist before and are not counted as memory.
        exact_dtype: the widest dtype it computes in.
    """

    run: Callable[[], Tensor]
    inputs: Inputs
    routing: Literal["given", "own", "none"] = "given"
    weights: Callable[[Tensor], Tensor] | None = None
    known: list[Tensor] = field(default_factory=list)
    exact_dtype: torch.dtype = torch.float64

    @property
    def leaves(self) -> list[Tensor]:
        """All of `inputs`, flat."""
        lists = [v if isinstance(v, list) else [v] for v in self.inputs.values()]
        return [tensor for tensors in lists for tensor in tensors]


@dataclass
class LinearCase:
    """Random numbers of one linear with experts: every form computes the same from them.

    Attributes:
        sizes: the sizes.
        x: tokens [T, D].
        onto: the base output [T, O]; it is given, so that only the experts are timed.
        choice: the experts of each token [T, K].
        slots: their weights [T, K], rows sum to one.
        a: the first factors [N, r, D].
        b: the second factors [N, O, r].
        upstream: gradient of the output [T, O].
        scale: what every delta is multiplied by.
    """

    sizes: Sizes
    x: Tensor
    onto: Tensor
    choice: Tensor
    slots: Tensor
    a: Tensor
    b: Tensor
    upstream: Tensor
    scale: float = 2.0

    @staticmethod
    def random(sizes: Sizes, seed: int = 0) -> "LinearCase":
        """Draw one; the numbers are the same for the same sizes and seed."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, size: float = 1.0) -> Tensor:
            drawn = torch.randn(*shape, generator=generator, dtype=torch.float64) * size
            return drawn.to(sizes.device, sizes.dtype)

        probs = normal(sizes.tokens, sizes.experts).float().softmax(-1)
        slots, choice = probs.topk(sizes.k, -1)
        return LinearCase(
            sizes=sizes,
            x=normal(sizes.tokens, sizes.width),
            onto=normal(sizes.tokens, sizes.out),
            choice=choice,
            slots=(slots / slots.sum(-1, keepdim=True)).to(sizes.dtype),
            a=normal(sizes.experts, sizes.rank, sizes.width, size=sizes.width**-0.5),
            b=normal(sizes.experts, sizes.out, sizes.rank, size=sizes.rank**-0.5),
            upstream=normal(sizes.tokens, sizes.out),
        )

    def to(self, dtype: torch.dtype) -> "LinearCase":
        """Return the same numbers in another dtype."""
        names = ("x", "onto", "slots", "a", "b", "upstream")
        cast = {name: getattr(self, name).detach().to(dtype) for name in names}
        return replace(self, sizes=replace(self.sizes, dtype=dtype), **cast)

    def dense_weights(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weights [T, N], 0 for experts not chosen."""
        slots = self.slots.detach().to(dtype or self.slots.dtype)
        empty = slots.new_zeros(self.sizes.tokens, self.sizes.experts)
        return empty.scatter(1, self.choice, slots)

    def merged(self) -> "LinearCase":
        """Return the case of one always-used expert that holds all ranks: a plain LoRA."""
        a, b = self.packed()
        sizes = replace(self.sizes, experts=1, rank=len(a), k=1)
        slots, choice = torch.ones_like(self.slots[:, :1]), torch.zeros_like(self.choice[:, :1])
        factors = {"a": a.unsqueeze(0), "b": b.unsqueeze(0)}
        return replace(self, sizes=sizes, slots=slots, choice=choice, **factors)

    def packed(self) -> tuple[Tensor, Tensor]:
        """Return A [R, D] and B [O, R]."""
        return self.a.flatten(0, 1), self.b.movedim(0, 1).flatten(1)


def leaf(tensor: Tensor) -> Tensor:
    """Return a copy that gradients are taken of."""
    return tensor.detach().clone().contiguous().requires_grad_()


def leaves(tensors: Tensor) -> list[Tensor]:
    """Return a leaf per entry of the first axis."""
    return [leaf(tensor) for tensor in tensors]


def canonical(gradients: dict[str, list[Tensor]], case: LinearCase) -> dict[str, Tensor]:
    """Return gradients under common names and shapes: x, A [R, D], B [O, R], slots [T, K]."""
    out = {
        "x": gradients["x"][0],
        "A": torch.cat(gradients["A"]),
        "B": torch.cat(gradients["B"], 1),
    }
    if "slots" in gradients:
        out["slots"] = gradients["slots"][0]
    if "weights" in gradients:
        out["slots"] = gradients["weights"][0].gather(1, case.choice)
    return out
