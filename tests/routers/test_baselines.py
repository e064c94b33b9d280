"""The two routers that a learned one has to beat: frozen random, and none at all."""

import pytest
import torch
from torch.testing import assert_close

from moeadapt.dispatch import dispatch
from moeadapt.errors import ConfigError
from moeadapt.routers import ROUTERS
from tests.samples import ALL_REAL, OUT, D, E, T, hidden, make_bank, make_router
from tests.tiny import KINDS, adapted


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_a_random_router_is_a_top_k_router_that_is_frozen():
    random, top_k = make_router("random"), make_router("top_k")
    top_k.load_state_dict(random.state_dict())
    x = hidden()
    assert_close(random(x, ALL_REAL).weights, top_k(x, ALL_REAL).weights)
    assert random.frozen
    assert not top_k.frozen


def test_a_random_router_cannot_be_thawed():
    with pytest.raises(ConfigError, match="freeze=False"):
        ROUTERS.parse({"name": "random", "freeze": False})


def test_a_random_router_refuses_more_experts_than_there_are():
    with pytest.raises(ConfigError, match="router 'random': k=5"):
        ROUTERS.parse({"name": "random", "k": E + 1}).build(D, E)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "router",
    [{"name": "random"}, {"name": "top_k", "freeze": True}, {"name": "top_k"}],
    ids=["random", "frozen_top_k", "top_k"],
)
def test_only_a_router_that_is_not_frozen_is_trained(kind, router):
    model = adapted("llama", kind, router=router)
    model.set_adapter("default")
    trains = {p.requires_grad for n, p in model.named_parameters() if "moeadapt_router" in n}
    assert trains == {router == {"name": "top_k"}}
    assert any(p.requires_grad for n, p in model.named_parameters() if "lora_A" in n)


def test_a_uniform_router_has_no_parameters_and_equal_weights():
    router = make_router("uniform")
    assert not list(router.parameters())
    assert not router.frozen
    routing = router(hidden(), ALL_REAL)
    assert torch.equal(routing.weights, torch.full((T, E), 1 / E, dtype=torch.float64))
    assert routing.max_active == E


def test_a_uniform_mixture_is_one_dense_lora():
    bank, x, onto = make_bank("lora"), hidden(), hidden(T, OUT)
    weights = make_router("uniform")(x, ALL_REAL).weights
    mean = sum(bank.delta_weight(e) for e in range(E)) / E
    assert_close(dispatch(x, weights, bank, onto), onto + x @ mean.T)
