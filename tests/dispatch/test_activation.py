"""The middle of a gated FFN: the published mixture, computed again instead of kept.

Letters: T tokens, D width, F width of the FFN, E experts, K slots, R = experts * rank.
"""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from moeadapt.dispatch import (
    Columns,
    Contraction,
    Expansion,
    Slots,
    mix_activation,
    mix_activation_reference,
)
from moeadapt.dispatch.slot_rows import MaskedRows, SortedRows

T, D, WIDTH, E, RANK = 37, 13, 29, 5, 3
SCALE = 1.5

every_rows = pytest.mark.parametrize("rows", [MaskedRows, SortedRows])
chunks = pytest.mark.parametrize("chunk", [1, 8, 37, 64])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Ffn:
    """One gated FFN with LoRA experts on all three projections, in float64."""

    def __init__(self, ranks: tuple[int, ...] = (RANK,) * E, shared: int = 0) -> None:
        self.ranks, self.shared = ranks, shared
        width = sum(ranks) + shared
        self.base = {n: _random(*s) for n, s in _SHAPES.items()}
        self.a = {n: _random(width, s[1]).requires_grad_() for n, s in _SHAPES.items()}
        self.b = {n: _random(s[0], width).requires_grad_() for n, s in _SHAPES.items()}
        self.columns = Columns(ranks, shared, torch.device("cpu"))

    @property
    def leaves(self) -> list[torch.Tensor]:
        return [*self.a.values(), *self.b.values()]

    def parts(self, x: torch.Tensor, slots: Slots):
        base = tuple(x @ self.base[n].T for n in ("gate", "up"))
        experts = tuple(
            Expansion(x @ self.a[n].T * SCALE, self.b[n], self.columns) for n in ("gate", "up")
        )
        down = Contraction(self.a["down"], self.columns)
        return base, experts, down, (slots.experts, slots.weights)

    def __call__(self, x, slots, activation=F.silu, *, run=mix_activation, **options):
        mixed, hidden = run(*self.parts(x, slots), activation, **options)
        return mixed @ self.base["down"].T + SCALE * hidden @ self.b["down"].T

    def published(self, x, weights, activation=F.silu):
        """Each expert's own tokens through its own FFN, base down projection included.

        MixLoRA, Li et al. 2024, https://arxiv.org/abs/2404.15159, eq. 3-6: the loop over experts
        that its authors' code runs.
        """
        ends = list(itertools.accumulate(self.ranks, initial=0))
        always = list(range(ends[-1], ends[-1] + self.shared))
        y = torch.zeros(x.shape[0], self.base["down"].shape[0], dtype=x.dtype)
        for e, (start, end) in enumerate(itertools.pairwise(ends)):
            own = [*range(start, end), *always]
            (tokens,) = torch.where(weights[:, e] != 0)

            def project(name, rows, own=own):
                delta = rows @ self.a[name][own].T @ self.b[name][:, own].T
                return rows @ self.base[name].T + SCALE * delta

            rows = x[tokens]
            out = project("down", activation(project("gate", rows)) * project("up", rows))
            y = y.index_add(0, tokens, out * weights[tokens, e, None])
        return y


_SHAPES = {"gate": (WIDTH, D), "up": (WIDTH, D), "down": (D, WIDTH)}


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64) * shape[-1] ** -0.5


def top_k(logits: torch.Tensor, k: int, *, renorm: bool = True) -> torch.Tensor:
    """Return dense weights of the k most probable experts."""
    probs = logits.softmax(-1)
    chosen = torch.zeros_like(probs).scatter(-1, probs.topk(k, -1).indices, 1.0)
    weights = probs * chosen
    return weights / weights.sum(-1, keepdim=True) if renorm else weights


@every_rows
@chunks
@pytest.mark.parametrize("k", [1, 2, 4])
def test_it_is_the_published_mixture_in_value_and_every_gradient(rows, chunk, k):
    ffn, x = Ffn(), _random(T, D).requires_grad_()
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    leaves, upstream, results = [x, logits, *ffn.leaves], _random(T, D), []
    weights = top_k(logits, k)
    slots = Slots.of(weights, k, sums_to_one=True)
    for y in (ffn(x, slots, chunk=chunk, rows=rows), ffn.published(x, weights)):
        results.append([y, *torch.autograd.grad(y, leaves, upstream, retain_graph=True)])
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, rtol=0, atol=1e-12)


@every_rows
@pytest.mark.parametrize("shared", [0, 4])
@pytest.mark.parametrize("ranks", [(RANK,) * E, (1, 5, 2, 3, 7)])
@pytest.mark.parametrize("sums_to_one", [True, False])
@pytest.mark.parametrize("activation", [F.silu, nn.SiLU(), nn.GELU("tanh"), torch.tanh])
def test_it_is_its_definition(rows, shared, ranks, sums_to_one, activation):
    """With what is left of a sum below one on the base FFN, and other sizes and functions."""
    ffn, x = Ffn(ranks, shared), _random(T, D).requires_grad_()
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    weights = top_k(logits, 2, renorm=sums_to_one)
    slots = Slots.of(weights, 2, sums_to_one=sums_to_one)
    leaves, upstream, results = [x, logits, *ffn.leaves], _random(T, D), []
    for run, options in (
        (mix_activation, {"chunk": 8, "rows": rows}),
        (mix_activation_reference, {}),
    ):
        y = ffn(x, slots, activation, run=run, **options)
        results.append([y, *torch.autograd.grad(y, leaves, upstream, retain_graph=True)])
    for ours, definition in zip(*results, strict=True):
        assert_close(ours, definition, rtol=0, atol=1e-12)


@every_rows
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_experts_that_change_nothing_leave_every_bit(rows, dtype, k):
    base = tuple(torch.randn(T, WIDTH, dtype=dtype) for _ in range(2))
    columns = Columns((RANK,) * E, 0, torch.device("cpu"))
    hidden, zero = torch.randn(T, RANK * E, dtype=dtype), torch.zeros(WIDTH, RANK * E, dtype=dtype)
    slots = Slots.of(top_k(torch.randn(T, E), k), k, sums_to_one=True)
    mixed, _ = mix_activation(
        base,
        (Expansion(hidden, zero, columns), Expansion(hidden, zero, columns)),
        Contraction(torch.randn(RANK * E, WIDTH, dtype=dtype), columns),
        (slots.experts, slots.weights),
        F.relu,  # exact; silu may differ in its last bit between positions of one tensor
        rows=rows,
        chunk=8,
    )
    assert torch.equal(mixed, F.relu(base[0]) * base[1])


@every_rows
def test_an_expert_that_is_not_chosen_may_be_infinite(rows):
    ffn, x = Ffn(), _random(T, D).requires_grad_()
    weights = torch.zeros(T, E, dtype=torch.float64)
    weights[:, :2] = 0.5
    slots = Slots.of(weights, 2, sums_to_one=True)
    base, experts, down, choice = ffn.parts(x, slots)
    hidden = [part.hidden.detach().clone() for part in experts]
    for h in hidden:
        h[:, 2 * RANK :] = torch.inf
        h.requires_grad_()
    wide = tuple(part._replace(hidden=h) for part, h in zip(experts, hidden, strict=True))
    mixed, rank_axis = mix_activation(base, wide, down, choice, F.silu, rows=rows, chunk=8)
    grads = torch.autograd.grad(mixed.sum() + rank_axis.sum(), [x, *hidden])
    assert all(torch.isfinite(t).all() for t in (mixed, rank_axis, *grads))


@every_rows
@pytest.mark.parametrize("k", [2, 4])
def test_two_tensors_of_the_width_are_kept_whatever_k(rows, k):
    ffn, x = Ffn(), _random(T, D).requires_grad_()
    slots = Slots.of(top_k(torch.randn(T, E, dtype=torch.float64), k), k, sums_to_one=True)
    parts = ffn.parts(x, slots)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mix_activation(*parts, F.silu, rows=rows, chunk=8)
    assert sum(tensor.shape == (T, WIDTH) for tensor in kept) == 2
    assert max(tensor.numel() for tensor in kept) == T * WIDTH


def test_nothing_is_kept_where_nobody_asks_for_a_gradient():
    ffn, x = Ffn(), _random(T, D)
    slots = Slots.of(top_k(torch.randn(T, E, dtype=torch.float64), 2), 2, sums_to_one=True)
    with torch.no_grad():
        plain = ffn(x, slots, chunk=8)
    kept = ffn(x, slots, chunk=8)
    assert not plain.requires_grad
    assert kept.requires_grad
    assert torch.equal(plain, kept)


@every_rows
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_it_is_as_near_to_the_truth_as_autograd(rows, dtype):
    """Also the router, whose gradient is a small difference of what all slots have in common."""
    ffn, tokens = Ffn(), 512
    sources = [_random(tokens, D), torch.randn(tokens, E, dtype=torch.float64), *ffn.leaves]
    upstream = [_random(tokens, WIDTH), _random(tokens, E * RANK)]

    def run(how, dtype, **options):
        x, logits, *matrices = (t.detach().to(dtype).requires_grad_() for t in sources)
        own = Ffn()
        own.base = {n: t.to(dtype) for n, t in ffn.base.items()}
        own.a, own.b = (dict(zip(_SHAPES, matrices[i : i + 3], strict=True)) for i in (0, 3))
        wide = torch.promote_types(dtype, torch.float32)
        weights = top_k(logits.to(wide), 2)
        slots = Slots.of(weights, 2, sums_to_one=True)
        outputs = how(*own.parts(x, slots), F.silu, **options)
        given = [t.to(dtype) for t in upstream]
        leaves = [x, logits, *matrices]
        grads = torch.autograd.grad(outputs, leaves, given, allow_unused=True)
        return [t.detach().double() for t in (*outputs, *grads) if t is not None]

    exact = run(mix_activation_reference, torch.float64)
    ours = run(mix_activation, dtype, rows=rows, chunk=100)
    kept = run(mix_activation_reference, dtype)
    for truth, found, autograd in zip(exact, ours, kept, strict=True):
        assert (found - truth).norm() <= 1.3 * (autograd - truth).norm()
