"""Experts put into another order, dropped and merged: what the new mixture computes."""

import pytest
import torch

from moeadapt import surgery
from moeadapt.tuner.inspect import heads_of
from moeadapt.tuner.plain import adapter_layers
from tests.merge.dense import deltas, observed
from tests.merge.kit import BIASED, KINDS, ROUTERS, batches, mixture, randomise, reloaded
from tests.tiny import batch, logits


@pytest.mark.parametrize("router", sorted(ROUTERS))
def test_another_order_computes_the_same(tmp_path, router):
    model = mixture(router=ROUTERS[router])
    randomise(model)
    result = surgery.reorder_experts(model, [2, 0, 3, 1], data=batches())
    assert torch.allclose(logits(result.model, batch()), logits(model, batch()), atol=1e-4)
    assert result.before.mean == pytest.approx(result.after.mean, abs=1e-5)
    for key, layer in adapter_layers(model).items():
        own, new = deltas(layer), deltas(adapter_layers(result.model)[key])
        for e, old in enumerate([2, 0, 3, 1, 4]):
            assert torch.equal(new[e], own[old])
    assert torch.equal(
        logits(reloaded(result.model, tmp_path), batch()), logits(result.model, batch())
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_may_differ_between_routers(kind):
    model = mixture(kind, **BIASED)
    randomise(model)
    heads = [name.partition("/")[2] for name in heads_of(model)]
    order = {name: ([1, 0, 3, 2] if i % 2 else [3, 1, 2, 0]) for i, name in enumerate(heads)}
    result = surgery.reorder_experts(model, order)
    assert torch.allclose(logits(result.model, batch()), logits(model, batch()), atol=1e-4)
    assert result.experts == {name: [[e] for e in own] for name, own in order.items()}


@pytest.mark.parametrize("experts", ["lora", "shared_a", "shared_b", "heterogeneous"])
def test_every_expert_type_can_be_reordered(experts):
    spec = {"name": experts, "ranks": [1, 4, 2, 3]} if experts == "heterogeneous" else experts
    model = mixture(experts=spec)
    result = surgery.reorder_experts(model, [2, 0, 3, 1])
    assert torch.allclose(logits(result.model, batch()), logits(model, batch()), atol=1e-4)
    if experts == "heterogeneous":
        assert result.model.peft_config["default"].experts["ranks"] == [2, 1, 3, 4]


@pytest.mark.parametrize("kind", KINDS)
def test_dropping_leaves_the_others_as_they_were(tmp_path, kind):
    model = mixture(kind, **BIASED)
    randomise(model)
    result = surgery.drop_experts(model, [1], data=batches())
    assert result.model.peft_config["default"].num_experts == 3
    assert set(map(str, result.experts.values())) == {"[[0], [2], [3]]"}
    olds = heads_of(model)
    for name, head in heads_of(result.model).items():
        old = olds[name].router
        assert head.router.num_experts == 3
        for field in ("weight", "noise_weight", "selection_bias"):
            assert torch.equal(getattr(head.router, field), getattr(old, field)[[0, 2, 3]])
    new = adapter_layers(result.model)
    for key, layer in adapter_layers(model).items():
        if layer.moe_plans["default"].placement == "unrouted":
            assert torch.equal(deltas(layer)[0], deltas(new[key])[0])
            continue
        kept = [deltas(layer)[e] for e in (0, 2, 3, 4)]
        assert all(map(torch.equal, kept, deltas(new[key])))
    loaded = reloaded(result.model, tmp_path)
    assert torch.equal(logits(loaded, batch()), logits(result.model, batch()))
    assert result.after.mean != result.before.mean


@pytest.mark.parametrize("experts", ["shared_a", "shared_b", "heterogeneous"])
def test_dropping_from_every_expert_type_leaves_the_others_as_they_were(tmp_path, experts):
    spec = {"name": experts, "ranks": [1, 4, 2, 3]} if experts == "heterogeneous" else experts
    model = mixture(experts=spec)
    result = surgery.drop_experts(model, [1])
    new = adapter_layers(result.model)
    for key, layer in adapter_layers(model).items():
        kept = [deltas(layer)[e] for e in (0, 2, 3, 4)]
        assert all(map(torch.equal, kept, deltas(new[key])))
    loaded = reloaded(result.model, tmp_path)
    assert torch.equal(logits(loaded, batch()), logits(result.model, batch()))


def test_dropping_by_usage_drops_what_is_used_least():
    model = mixture()
    result = surgery.drop_experts(model, count=2, data=batches())
    for key, (_, _, weights) in observed(model, batches()).items():
        kept = sorted(weights.mean(0).argsort()[2:].tolist())
        assert result.experts[key] == [[e] for e in kept]


def test_dropping_by_error_drops_what_adds_least():
    model = mixture("block", n_shared=0)
    result = surgery.drop_experts(model, count=1, by="error", data=batches())
    layers, shares = adapter_layers(model), {}
    for key, (x, d, weights) in observed(model, batches()).items():
        head = key.rpartition(".")[0]
        own = [
            (weights[:, e : e + 1] * (x @ delta.T)).square().sum() / d.square().sum()
            for e, delta in enumerate(deltas(layers[key]))
        ]
        shares[head] = shares.get(head, 0) + torch.stack(own)
    for head, share in shares.items():
        kept = sorted(share.argsort()[1:].tolist())
        assert result.experts[head] == [[e] for e in kept]


TWINS = [(kind, "lora") for kind in KINDS] + [("layer", "shared_a"), ("layer", "shared_b")]


@pytest.mark.parametrize(("kind", "experts"), TWINS)
def test_equal_experts_are_found_and_merged_exactly(kind, experts, tmp_path):
    model = mixture(kind, experts=experts, router="uniform")
    twin(model, 3, 1)
    result = surgery.merge_experts(model, 3, data=batches())
    assert set(map(str, result.experts.values())) == {"[[0], [1, 3], [2]]"}
    new = adapter_layers(result.model)
    for key, layer in adapter_layers(model).items():
        own = deltas(layer)
        if len(own) > 1:
            torch.testing.assert_close(own[1], own[3])
            kept = [own[e] for e in (0, 1, 2, 4)]
            for mine, theirs in zip(kept, deltas(new[key]), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)
    loaded = reloaded(result.model, tmp_path)
    assert torch.equal(logits(loaded, batch()), logits(result.model, batch()))


def twin(model, copy, of):
    axes = {"lora_A": 0, "lora_B": 1}
    for layer in adapter_layers(model).values():
        bank = layer.moe_banks["default"]
        if bank.size.num_experts == 1:
            continue
        for name, axis in axes.items():
            factor = bank.factor(name).weight.data
            if factor.shape[axis] > 4:
                own = factor.narrow(axis, 4 * of, 4).clone()
                factor.narrow(axis, 4 * copy, 4).copy_(own)


@pytest.mark.parametrize("experts", ["shared_a", "shared_b"])
def test_experts_that_share_a_factor_are_merged_to_their_mean_without_loss(experts):
    model = mixture(experts=experts, router={"name": "top_k", "k": 2})
    result = surgery.merge_experts(model, 2)
    new = adapter_layers(result.model)
    for key, layer in adapter_layers(model).items():
        own, now = deltas(layer), deltas(new[key])
        for group, found in zip(result.experts[key], now, strict=False):
            mean = sum(own[e] for e in group) / len(group)
            torch.testing.assert_close(found, mean, rtol=1e-6, atol=1e-9)
        assert torch.equal(own[-1], now[-1])


def test_a_merged_expert_is_the_used_mean_at_the_rank_of_one():
    model = mixture(n_shared=0)
    result = surgery.merge_experts(model, 3, data=batches())
    new = adapter_layers(result.model)
    for key, (_, _, weights) in observed(model, batches()).items():
        usage = weights.mean(0)
        own = deltas(adapter_layers(model)[key])
        flat = torch.stack([delta.flatten() for delta in own])
        cosine = torch.nn.functional.normalize(flat) @ torch.nn.functional.normalize(flat).T
        pair = divmod(int(cosine.fill_diagonal_(-2).argmax()), 4)
        (i, j) = sorted(pair)
        assert sorted(map(len, result.experts[key])) == [1, 1, 2]
        assert [i, j] in result.experts[key]
        mean = (usage[i] * own[i] + usage[j] * own[j]) / (usage[i] + usage[j])
        u, s, vh = torch.linalg.svd(mean)
        expected = (u[:, :4] * s[:4]) @ vh[:4]
        found = deltas(new[key])[result.experts[key].index([i, j])]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        old, router = (
            adapter_layers(m)[key].moe_heads["default"].router.weight for m in (model, result.model)
        )
        row = (usage[i] * old[i] + usage[j] * old[j]) / (usage[i] + usage[j])
        place = result.experts[key].index([i, j])
        torch.testing.assert_close(router[place].double(), row.double(), rtol=1e-4, atol=1e-5)
