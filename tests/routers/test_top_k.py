"""Top-k: its normalisations, its noise, and transformers' own router as an oracle."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from moeadapt.errors import ConfigError
from moeadapt.routers import ROUTERS
from tests.samples import ALL_REAL, D, E, T, hidden, make_router


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --- the oracle


@pytest.mark.parametrize(("num_experts", "k"), [(4, 2), (7, 3), (17, 2), (61, 5), (5, 5)])
@pytest.mark.parametrize("normalize", ["renorm", "topk_softmax"])
def test_it_routes_as_mixtral_does_in_value_and_gradient(num_experts, k, normalize):
    ours = ROUTERS.parse({"name": "top_k", "k": k, "normalize": normalize}).build(D, num_experts)
    theirs = MixtralTopKRouter(
        MixtralConfig(hidden_size=D, num_local_experts=num_experts, num_experts_per_tok=k)
    )
    torch.nn.init.normal_(ours.weight)
    theirs.weight.data = ours.weight.detach().clone()
    x = hidden(101).float()
    routing = ours(x, ALL_REAL)
    logits, weights, experts = theirs(x)
    dense = torch.zeros_like(logits).scatter(-1, experts, weights)
    assert torch.equal(routing.logits, logits)
    assert_close(routing.weights, dense)
    assert torch.equal(routing.weights != 0, dense != 0)
    readout = torch.randn_like(dense)
    (found,) = torch.autograd.grad((routing.weights * readout).sum(), ours.weight)
    (expected,) = torch.autograd.grad((dense * readout).sum(), theirs.weight)
    assert_close(found, expected)


# --- definitions


@pytest.mark.parametrize("k", [1, 2, 3, E])
def test_weights_are_the_kept_probabilities(k):
    routing = make_router({"name": "top_k", "k": k, "normalize": "none"})(hidden(), ALL_REAL)
    for t in range(T):
        kept = sorted(routing.probs[t].tolist(), reverse=True)[:k]
        assert sorted(routing.weights[t].tolist(), reverse=True)[:k] == kept
        assert (routing.weights[t] != 0).sum() == k


def test_both_normalisations_are_the_same_numbers():
    renorm, softmax = (
        make_router({"name": "top_k", "normalize": name}) for name in ("renorm", "topk_softmax")
    )
    softmax.load_state_dict(renorm.state_dict())
    x = hidden()
    assert_close(renorm(x, ALL_REAL).weights, softmax(x, ALL_REAL).weights)


@pytest.mark.parametrize(("k", "expected"), [(1, "none"), (2, "renorm")])
def test_the_default_normalisation_can_train_the_router(k, expected):
    config = ROUTERS.parse({"name": "top_k", "k": k})
    assert config.resolved_normalize() == expected
    router = config.build(D, E)
    assert router.sums_to_one == (expected == "renorm")
    weights = router(hidden().float(), ALL_REAL).weights
    (gradient,) = torch.autograd.grad((weights * torch.randn(T, E)).sum(), router.weight)
    assert gradient.any()


def test_one_renormalised_expert_is_a_constant():
    config = ROUTERS.parse({"name": "top_k", "k": 1, "normalize": "renorm"})
    with pytest.warns(UserWarning, match="use normalize='none'"):
        router = config.build(D, E)
    weights = router(hidden().float(), ALL_REAL).weights
    (gradient,) = torch.autograd.grad((weights * torch.randn(T, E)).sum(), router.weight)
    assert gradient.abs().max() < 1e-6


def test_more_experts_per_token_than_there_are_is_refused():
    with pytest.raises(ConfigError, match=r"k=5 is larger than num_experts=4; choose k in 1\.\.4"):
        ROUTERS.parse({"name": "top_k", "k": E + 1}).build(D, E)


# --- options of every linear router


def test_a_temperature_divides_the_logits():
    sharp, flat = (make_router({"name": "top_k", "temperature": t}) for t in (0.5, 2.0))
    flat.load_state_dict(sharp.state_dict())
    x = hidden()
    assert_close(sharp(x, ALL_REAL).logits, 4 * flat(x, ALL_REAL).logits)


def test_a_bias_is_added_and_trained():
    router = make_router({"name": "top_k", "bias": True})
    x = hidden()
    routing = router(x, ALL_REAL)
    assert_close(routing.logits, x @ router.weight.T + router.bias)
    assert torch.autograd.grad(routing.weights[:, 0].sum(), router.bias)[0].any()


def test_norms_make_the_logits_independent_of_size_and_offset():
    x = hidden()
    rms = make_router({"name": "top_k", "norm": "rms"})
    unit = x / x.square().mean(-1, keepdim=True).sqrt()
    assert_close(rms(x, ALL_REAL).logits, unit @ rms.weight.T)
    standard = make_router({"name": "top_k", "norm": "standardize"})
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert_close(standard(x, ALL_REAL).logits, scaled @ standard.weight.T)


def test_the_gate_starts_at_init_std_and_never_at_zero():
    router = ROUTERS.parse({"name": "top_k", "init_std": 0.3}).build(1009, 7)
    assert_close(router.weight.std(), torch.tensor(0.3), rtol=0.05, atol=0)


@pytest.mark.parametrize("noise", ["none", "gaussian", "softplus"])
@pytest.mark.parametrize("jitter", [0.0, 0.1])
def test_stop_gradient_keeps_the_router_out_of_the_model(noise, jitter):
    spec = {"name": "top_k", "noise": noise, "jitter": jitter}
    for choice, flows in (("hidden", True), ("stop_gradient", False)):
        router = make_router({**spec, "input": choice}).train()
        x = hidden().requires_grad_()
        weights = (router(x, ALL_REAL).weights * torch.randn(T, E)).sum()
        grads = torch.autograd.grad(weights, [x, *router.parameters()], allow_unused=True)
        assert (grads[0] is not None and bool(grads[0].any())) == flows
        assert all(g is not None and bool(g.any()) for g in grads[1:])


def test_a_frozen_router_says_so():
    assert ROUTERS.parse({"name": "top_k", "freeze": True}).build(D, E).frozen
    assert not ROUTERS.parse("top_k").build(D, E).frozen


# --- noise


@pytest.mark.parametrize(
    "option", [{"noise": "gaussian"}, {"noise": "softplus"}, {"jitter": 0.3}], ids=repr
)
def test_noise_is_for_training_and_redrawn_from_the_same_seed(option):
    router, x = make_router({"name": "top_k", **option}), hidden()
    router.eval()
    assert torch.equal(router(x, ALL_REAL).logits, router(x, ALL_REAL).logits)
    assert_close(router(x, ALL_REAL).logits, x @ router.weight.T)
    router.train()
    state = torch.get_rng_state()
    first, other = router(x, ALL_REAL).logits, router(x, ALL_REAL).logits
    assert not torch.equal(first, other)
    torch.set_rng_state(state)
    assert torch.equal(router(x, ALL_REAL).logits, first)


def test_gaussian_noise_has_the_given_spread():
    router = make_router({"name": "top_k", "noise": "gaussian", "noise_std": 0.25}).train()
    x = hidden(10007)
    noise = (router(x, ALL_REAL).logits - x @ router.weight.T).detach()
    assert_close(float(noise.std()), 0.25, rtol=0.02, atol=0)
    assert abs(float(noise.mean())) < 0.01


def test_softplus_noise_is_shazeers_equation():
    router = make_router({"name": "top_k", "noise": "softplus", "noise_std": 2.0}).train()
    x = hidden()
    torch.manual_seed(1)
    found = router(x, ALL_REAL).logits
    torch.manual_seed(1)
    normal = torch.randn(T, E, dtype=torch.float64)
    spread = F.softplus(x @ router.noise_weight.T)
    assert_close(found, x @ router.weight.T + 2.0 * normal * spread)


def test_jitter_multiplies_the_hidden_state():
    router = make_router({"name": "top_k", "jitter": 0.25}).train()
    x = hidden()
    torch.manual_seed(1)
    found = router(x, ALL_REAL).logits
    torch.manual_seed(1)
    factor = torch.empty_like(x).uniform_(0.75, 1.25)
    assert_close(found, (x * factor) @ router.weight.T)


def test_only_learned_noise_has_a_parameter():
    names = {
        noise: {n for n, _ in make_router({"name": "top_k", "noise": noise}).named_parameters()}
        for noise in ("none", "gaussian", "softplus")
    }
    assert names["none"] == names["gaussian"] == {"weight"}
    assert names["softplus"] == {"weight", "noise_weight"}
