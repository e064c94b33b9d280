"""What-if routing changes who gets a token, and nothing else."""

import pytest
import torch
from torch.testing import assert_close

import moeadapt
from moeadapt.errors import ConfigError
from tests.tiny import adapted, batch, logits, moe_config

KINDS = ("layer", "block", "ffn", "glu")
kinds = pytest.mark.parametrize("kind", KINDS)


def model_of(kind: str, **fields):
    """Return a mixture in float64 whose experts do something."""
    fields = {"num_experts": 4, "init_lora_weights": False, **fields}
    return adapted("llama", kind, **fields).double().eval()


def routed(model, **override):
    """Return logits and routings under an override."""
    with moeadapt.collect_routing(model) as routings, moeadapt.override_routing(model, **override):
        out = logits(model, batch())
    return out, {name: found[0] for name, found in routings.items()}


@kinds
def test_without_a_block_nothing_is_changed(kind):
    model = model_of(kind)
    before = logits(model, batch())
    changed, _ = routed(model, force=1)
    assert not torch.equal(changed, before)
    assert torch.equal(logits(model, batch()), before)


@kinds
@pytest.mark.parametrize("k", [1, 3])
def test_a_forced_expert_is_that_expert_alone(kind, k):
    """Compared with a model whose router gives every token to it."""
    model = model_of(kind, router={"name": "top_k", "k": 2})
    for expert in (0, 3):
        out, routings = routed(model, force=expert)
        for routing in routings.values():
            assert_close(routing.weights.sum(-1), torch.ones(len(routing.weights)).double())
            assert (routing.weights[:, expert] > 0).all()
            assert ((routing.weights != 0).sum(-1) == 1).all()

        def one_hot(_, routing, expert=expert):
            weights = torch.zeros_like(routing.weights)
            weights[:, expert] = 1
            return weights

        edited, _ = routed(model, edit=one_hot)
        assert_close(out, edited)


@kinds
def test_k_of_the_router_itself_changes_nothing(kind):
    model = model_of(kind, router={"name": "top_k", "k": 2})
    out, _ = routed(model, k=2)
    assert_close(out, logits(model, batch()))


def test_another_k_is_a_router_of_that_k():
    three = model_of("block", router={"name": "top_k", "k": 3})
    two = model_of("block", router={"name": "top_k", "k": 2})
    two.load_state_dict(three.state_dict())
    out, _ = routed(two, k=3)
    assert_close(out, logits(three, batch()))


@kinds
def test_a_banned_expert_gets_no_token_and_the_next_takes_its_place(kind):
    model = model_of(kind, router={"name": "top_k", "k": 2})
    _, plain = routed(model, k=2)
    _, found = routed(model, ban=1)
    # Later layers see other inputs; the first sees the same.
    first = next(iter(plain))
    chosen = plain[first].weights[:, 1] != 0
    assert chosen.any()
    assert not chosen.all()
    for routing in found.values():
        assert (routing.weights[:, 1] == 0).all()
        assert ((routing.weights != 0).sum(-1) == 2).all()
    assert_close(found[first].weights[~chosen], plain[first].weights[~chosen])
    probs = plain[first].probs.clone()
    probs[:, 1] = 0
    best = probs.topk(2, -1)
    expected = torch.zeros_like(probs).scatter(1, best.indices, best.values)
    assert_close(found[first].weights, expected / expected.sum(-1, keepdim=True))


def test_uniform_is_the_uniform_router():
    model = model_of("ffn")
    out, routings = routed(model, router="uniform")
    for routing in routings.values():
        assert_close(routing.weights, torch.full_like(routing.weights, 0.25))
    uniform = model_of("ffn", router="uniform")
    uniform.load_state_dict(model.state_dict(), strict=False)
    assert_close(out, logits(uniform, batch()))


@pytest.mark.parametrize("router", ["random", "shuffled"])
def test_random_routing_keeps_each_tokens_weights_or_their_distribution(router):
    model = model_of("layer")
    _, plain = routed(model, k=2)
    _, found = routed(model, router=router, seed=3)
    _, again = routed(model, router=router, seed=3)
    _, other = routed(model, router=router, seed=4)
    first = next(iter(plain))
    assert torch.equal(found[first].weights, again[first].weights)
    assert not torch.equal(found[first].weights, other[first].weights)
    mine, theirs = found[first].weights, plain[first].weights
    if router == "random":
        assert_close(mine.sort(-1).values, theirs.sort(-1).values)
    else:
        mask = plain[first].token_mask
        assert mask is not None
        assert not mask.all()
        for rows in (mask, ~mask):
            assert_close(sorted(mine[rows].tolist()), sorted(theirs[rows].tolist()))


def test_swapped_experts_trade_their_tokens():
    model = model_of("block")
    _, plain = routed(model, k=2)
    _, found = routed(model, swap=(0, 2))
    first = next(iter(plain))
    assert_close(found[first].weights, plain[first].weights[:, [2, 1, 0, 3]])


def test_only_the_named_layers_are_overridden():
    model = model_of("block")
    _, plain = routed(model, k=2)
    last = list(plain)[-1]
    _, found = routed(model, force=0, layers=[last])
    for name in plain:
        same = torch.allclose(found[name].weights, plain[name].weights)
        assert same == (name != last)


def test_weights_that_do_not_sum_to_one_keep_their_sum():
    model = model_of("layer", router={"name": "top_k", "k": 2, "normalize": "none"})
    _, plain = routed(model, edit=lambda _, routing: routing.expert_weights)
    _, found = routed(model, force=[1, 2])
    first = next(iter(plain))
    assert_close(found[first].weights.sum(-1), plain[first].weights.sum(-1))
    assert_close(found[first].weights[:, 1], found[first].weights[:, 2])


def test_experts_without_any_probability_share_what_a_banned_one_had():
    model = model_of("layer", router={"name": "hash", "k": 1})
    _, found = routed(model, ban=0)
    for routing in found.values():
        assert_close(routing.weights.sum(-1), torch.ones(len(routing.weights)).double())
        assert not routing.weights[:, 0].any()


def test_null_experts_keep_what_they_have():
    model = model_of("layer", router={"name": "top_k", "k": 3, "null_experts": 3})
    _, plain = routed(model, edit=lambda _, routing: routing.expert_weights)
    _, found = routed(model, router="uniform")
    first = next(iter(plain))
    assert_close(found[first].weights[:, 4:], plain[first].weights[:, 4:])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({}, "got none"),
        ({"force": 0, "ban": 1}, "force and ban or k"),
        ({"force": 4}, "force=4: model.layers.0"),
        ({"ban": [0, 1, 2, 3]}, "without experts"),
        ({"ban": 0, "k": 4}, "k=4 must be from 1 to 3"),
        ({"router": "best"}, "one of uniform, random, shuffled"),
        ({"layers": ["model.layers.9"], "force": 0}, "no router at"),
        ({"force": []}, "non-empty"),
        ({"edit": lambda _, routing: routing.weights[:, :2]}, "edit returned weights of shape"),
    ],
)
def test_what_cannot_be_is_refused(override, message):
    model = model_of("layer")
    with pytest.raises(ConfigError, match=message):
        routed(model, **override)
    # The model is as it was.
    logits(model, batch())


def test_a_model_without_a_mixture_is_refused():
    with pytest.raises(ConfigError, match="no mixture"), moeadapt.override_routing(torch.nn.ReLU()):
        pass


def biased(kind: str = "layer"):
    """Return a mixture whose choice a selection bias sets apart from its probabilities."""
    router = {"name": "top_k", "k": 2, "init_std": 0.5}
    model = model_of(kind, router=router, balance={"loss_free": {}})
    for name, buffer in model.named_buffers():
        if name.endswith("selection_bias"):
            buffer.copy_(torch.tensor([0.0, -0.5, 0.0, 0.0]))
    return model


def test_a_ban_leaves_tokens_alone_that_do_not_use_the_expert():
    model = biased()
    _, plain = routed(model, edit=lambda _, routing: routing.expert_weights)
    first = next(iter(plain))
    own, probs = plain[first].weights, plain[first].probs
    # Else the test would not tell the choice from the probabilities.
    assert not torch.equal(own != 0, probs >= probs.topk(2).values[:, 1:])
    for expert in range(4):
        _, found = routed(model, ban=expert)
        unused = own[:, expert] == 0
        assert torch.equal(found[first].weights[unused], own[unused])
        kept = (own != 0) & (torch.arange(4) != expert)
        assert (found[first].weights[kept] > 0).all()


def test_only_the_active_adapter_is_asked_for_its_experts():
    model = model_of("layer", num_experts=6)
    model.add_adapter("other", moe_config("layer", num_experts=2))
    model.double()
    out, _ = routed(model, force=5)
    assert torch.isfinite(out).all()
    with pytest.raises(ConfigError, match="has the experts 0 to 5"):
        routed(model, force=6)
    model.set_adapter("other")
    with pytest.raises(ConfigError, match="has the experts 0 to 1"):
        routed(model, force=5)


def test_an_adapter_that_is_activated_inside_the_block_is_checked_too():
    model = model_of("layer", num_experts=6)
    model.add_adapter("other", moe_config("layer", num_experts=2))
    model.double()
    with moeadapt.override_routing(model, force=5):
        model.set_adapter("other")
        with pytest.raises(ConfigError, match="has the experts 0 to 1"):
            logits(model, batch())
