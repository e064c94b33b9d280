"""The value between routers and experts, and the choice of the k largest scores."""

import pickle

import pytest
import torch
from torch.testing import assert_close
from torch.utils import _pytree as pytree

from moeadapt.routing import Routing, select_top_k
from tests.samples import ALL_REAL, E, T, hidden, make_router

# Both forms of the choice: all pairs at once, and one pass per slot.
SIZES = [3, 4, 16, 17, 61]
sizes = pytest.mark.parametrize("num_experts", SIZES)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def largest(row: list[float], k: int) -> set[int]:
    """Define the choice: sort by falling score, then by rising index."""
    return set(sorted(range(len(row)), key=lambda e: (-row[e], e))[:k])


def chosen(scores: torch.Tensor, k: int) -> list[set[int]]:
    """Return the chosen experts per row."""
    return [set(row.nonzero().flatten().tolist()) for row in select_top_k(scores, k)]


@sizes
@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_k_largest_are_chosen(num_experts, k):
    scores = torch.randn(T, num_experts, dtype=torch.float64)
    assert chosen(scores, k) == [largest(row, k) for row in scores.tolist()]


@sizes
@pytest.mark.parametrize("k", [1, 2, 3])
def test_among_equals_the_lowest_index_is_chosen(num_experts, k):
    scores = torch.randint(0, 2, (101, num_experts)).double()
    assert chosen(scores, k) == [largest(row, k) for row in scores.tolist()]
    assert chosen(torch.zeros(1, num_experts), k) == [set(range(k))]


@sizes
@pytest.mark.parametrize("value", [1e4, -1e4, 3e38, -3e38])
def test_extreme_scores_are_ordered_too(num_experts, value):
    scores = torch.zeros(T, num_experts)
    scores[:, 2] = value
    assert chosen(scores, 1) == [largest(row, 1) for row in scores.tolist()]


@sizes
def test_k_of_all_experts_or_more_chooses_all(num_experts):
    scores = torch.randn(T, num_experts)
    for k in (num_experts, num_experts + 1):
        assert select_top_k(scores, k).all()


@pytest.mark.compile
@sizes
@pytest.mark.parametrize("k", [1, 2])
def test_a_compiled_choice_is_the_eager_choice(num_experts, k):
    torch._dynamo.reset()
    compiled = torch.compile(select_top_k, backend="aot_eager", fullgraph=True)
    for scores in (torch.randn(T, num_experts), torch.randint(0, 2, (T, num_experts)).float()):
        assert torch.equal(compiled(scores, k), select_top_k(scores, k))


@sizes
def test_a_choice_has_no_gradient_and_leaves_its_scores_alone(num_experts):
    scores = torch.randn(T, num_experts, requires_grad=True)
    before = scores.detach().clone()
    assert not select_top_k(scores, 2).requires_grad
    assert torch.equal(scores, before)


def test_slots_are_sorted_by_weight():
    routing = make_router({"name": "top_k", "k": 3})(hidden(), ALL_REAL)
    experts, weights = routing.slots()
    assert experts.shape == weights.shape == (T, 3)
    assert (weights[:, :-1] >= weights[:, 1:]).all()
    assert_close(weights, routing.weights.gather(-1, experts))


def test_slots_carry_the_gradient_of_the_weights():
    routing = make_router("top_k")(hidden(), ALL_REAL)
    weights = routing.slots()[1]
    readout = torch.randn_like(weights)
    (found,) = torch.autograd.grad((weights * readout).sum(), routing.weights)
    assert (found != 0).sum() == T * routing.max_active


def test_a_detached_routing_is_equal_and_has_no_graph():
    routing = make_router("top_k")(hidden().requires_grad_(), ALL_REAL)
    plain = routing.detach()
    for name in ("logits", "probs", "weights"):
        assert getattr(routing, name).requires_grad
        assert not getattr(plain, name).requires_grad
        assert torch.equal(getattr(plain, name), getattr(routing, name))
    assert (plain.max_active, plain.num_experts) == (routing.max_active, E)


@pytest.mark.parametrize("mask", [None, torch.ones(T, dtype=torch.bool)], ids=["all", "mask"])
def test_a_routing_is_a_tree_of_its_tensors(mask):
    zeros = torch.zeros(T, E)
    routing = Routing(logits=zeros, probs=zeros, weights=zeros, max_active=2, token_mask=mask)
    moved = pytree.tree_map_only(
        torch.Tensor, lambda t: t + 1 if t.is_floating_point() else ~t, routing
    )
    assert isinstance(moved, Routing)
    assert moved.max_active == 2
    assert torch.equal(moved.probs, zeros + 1)
    assert moved.token_mask is None if mask is None else not moved.token_mask.any()


def test_a_routing_cannot_be_changed_and_can_be_pickled():
    routing = make_router("uniform")(hidden(), ALL_REAL)
    with pytest.raises(AttributeError):
        routing.max_active = 1
    again = pickle.loads(pickle.dumps(routing))
    assert torch.equal(again.weights, routing.weights)


def test_shapes_that_disagree_are_refused_in_tests(request):
    if not request.config.getoption("jaxtyping_packages", default=None):
        # The run of the compile tests switches them off; the default suite has them on.
        pytest.skip("run-time shape checks are off")
    zeros = torch.zeros(T, E)
    with pytest.raises(Exception, match=r"(?s)Type-check error.*probs"):
        Routing(logits=zeros, probs=zeros[1:], weights=zeros, max_active=1)
