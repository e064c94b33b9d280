"""Runs a router beside a slow definition of it, token by token, and compares gradients too."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.testing import assert_close

from moeadapt.routers import Router
from tests.samples import context, hidden


def assert_routes_as(
    router: Router, define: Callable[[Tensor], list[Tensor]], tokens: int = 23
) -> Tensor:
    """Check weights and every gradient against `define(x)`: the weights of one token, as a list.

    Returns:
        The weights.
    """
    x = hidden(tokens).requires_grad_()
    leaves = [x, *router.parameters()]
    readout = torch.randn(tokens, router.width, dtype=torch.float64)
    found = router(x, context(tokens)).weights
    expected = torch.stack([torch.stack(define(row)) for row in x])
    assert_close(found, expected)
    pairs = zip(
        torch.autograd.grad((found * readout).sum(), leaves, allow_unused=True),
        torch.autograd.grad((expected * readout).sum(), leaves, allow_unused=True),
        strict=True,
    )
    for ours, theirs in pairs:
        assert (ours is None) == (theirs is None) or not (ours if theirs is None else theirs).any()
        if ours is not None and theirs is not None:
            assert_close(ours, theirs)
    return found.detach()


def value(number: Tensor) -> float:
    """Return a number without its gradient."""
    return float(number.detach())


def softmax(values: list[Tensor]) -> list[Tensor]:
    """Return the definition of a softmax."""
    top = max(v.detach() for v in values)
    exps = [(v - top).exp() for v in values]
    return [e / sum(exps) for e in exps]


def scores(router: Router, x: Tensor) -> list[Tensor]:
    """Return the logits of one token: one dot product per expert."""
    return [(row * x).sum() for row in router.weight]


def largest(values: list[Tensor], k: int) -> set[int]:
    """Return the indices of the k largest."""
    return set(sorted(range(len(values)), key=lambda i: -value(values[i]))[:k])


def shared_out(values: list[Tensor], chosen: set[int]) -> list[Tensor]:
    """Divide the chosen values by their sum, zero elsewhere."""
    total = sum(values[i] for i in chosen)
    return [v / total if i in chosen else v * 0 for i, v in enumerate(values)]
