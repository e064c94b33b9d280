"""What the tests of expert types share: an independent mixture to compare with."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.testing import assert_close

from moeadapt.dispatch import dispatch
from moeadapt.experts import ExpertBank
from tests.samples import OUT, D, E, T, factors_of, hidden


def routing_weights(num_experts: int = E, tokens: int = T) -> Tensor:
    """Return weights of which some are exactly zero and no row is."""
    weights = torch.rand(tokens, num_experts, dtype=torch.float64)
    weights = weights * (weights > 0.3)
    weights[:, 0] += 0.1
    return weights


def check_mixture(
    bank: ExpertBank,
    reference: Callable[[Tensor, Tensor, Tensor], Tensor],
    leaves: list[Tensor] | None = None,
) -> None:
    """Compare `mix` with `reference(x, weights, onto)` in value and in every gradient."""
    x, onto = hidden(T, D).requires_grad_(), hidden(T, OUT).requires_grad_()
    weights = routing_weights(bank.size.num_experts).requires_grad_()
    leaves = [x, onto, weights, *(factors_of(bank) if leaves is None else leaves)]
    upstream = hidden(T, OUT)
    expected = reference(x, weights, onto)
    wanted = torch.autograd.grad(expected, leaves, upstream)
    for inplace in (False, True):
        found = dispatch(x, weights, bank, onto * 1, inplace=inplace)
        assert_close(found, expected)
        for fast, slow in zip(torch.autograd.grad(found, leaves, upstream), wanted, strict=True):
            assert slow.any()
            assert_close(fast, slow)
