"""Edited mixtures: what they compute, that they are saved whole, and what is refused."""

import pytest
import torch
from peft import PeftModel

from moeadapt import surgery
from moeadapt.errors import ConfigError, UnsupportedError
from moeadapt.tuner.inspect import heads_of
from moeadapt.tuner.plain import adapter_layers
from tests.merge.dense import SEEDS, deltas, num_experts, observed
from tests.tiny import adapted, batch, labels_of, logits, tiny

KINDS = ("layer", "block", "ffn")
ROUTERS = {
    "top_k": {"name": "top_k", "k": 2, "init_std": 0.5, "bias": True, "null_experts": 2},
    "noisy": {"name": "top_k", "k": 2, "init_std": 0.5, "noise": "softplus"},
    "cosine": {"name": "cosine", "k": 2},
    "dynamic": {"name": "dynamic"},
    "threshold": {"name": "threshold", "learned": True},
    "sparsegen": {"name": "sparsegen"},
    "uniform": {"name": "uniform"},
    "soft": {"name": "soft", "init_std": 0.5},
}
BIASED = {"router": ROUTERS["noisy"], "balance": {"loss_free": 0.1}}


def mixture(kind="layer", **overrides):
    return adapted("llama", kind, **{"n_shared": 1, **overrides}).double()


def batches():
    return [batch(seed=seed) for seed in SEEDS]


def reloaded(model, folder):
    model.save_pretrained(str(folder))
    return PeftModel.from_pretrained(tiny("llama").double(), str(folder)).eval()


def randomise(model):
    """Give every row of every router its own numbers, buffers included."""
    generator = torch.Generator().manual_seed(3)
    for head in heads_of(model).values():
        tensors = dict(head.router.named_parameters()) | dict(head.router.named_buffers())
        for tensor in tensors.values():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.data.add_(0.05 * noise.to(tensor))


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


@pytest.mark.parametrize("kind", KINDS)
def test_equal_experts_are_found_and_merged_exactly(kind, tmp_path):
    model = mixture(kind, router="uniform")
    twin(model, 3, 1)
    result = surgery.merge_experts(model, 3, data=batches())
    assert set(map(str, result.experts.values())) == {"[[0], [1, 3], [2]]"}
    new = adapter_layers(result.model)
    for key, layer in adapter_layers(model).items():
        own = deltas(layer)
        if len(own) > 1:
            kept = [own[e] for e in (0, 1, 2, 4)]
            for mine, theirs in zip(kept, deltas(new[key]), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    loaded = reloaded(result.model, tmp_path)
    assert torch.equal(logits(loaded, batch()), logits(result.model, batch()))


def twin(model, copy, of):
    for layer in adapter_layers(model).values():
        bank = layer.moe_banks["default"]
        if bank.size.num_experts == 1:
            continue
        a, b = bank.factor("lora_A").weight.data, bank.factor("lora_B").weight.data
        a[4 * copy : 4 * copy + 4] = a[4 * of : 4 * of + 4]
        b[:, 4 * copy : 4 * copy + 4] = b[:, 4 * of : 4 * of + 4]


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


@pytest.mark.parametrize("experts", ["lora", "shared_a", "shared_b", "heterogeneous"])
def test_added_experts_add_nothing_yet(tmp_path, experts):
    spec = {"name": experts, "ranks": [1, 4, 2, 3]} if experts == "heterogeneous" else experts
    model = mixture(experts=spec, router=ROUTERS["soft"])
    result = surgery.add_experts(model, 2)
    assert result.model.peft_config["default"].num_experts == 6
    rows = [h.router.weight[4:] for h in heads_of(result.model).values()]
    assert all(0 < row.abs().max() < 5 for row in rows)
    new = adapter_layers(result.model)
    for key, layer in adapter_layers(model).items():
        own, now = deltas(layer), deltas(new[key])
        assert all(map(torch.equal, own[:4], now[:4]))
        assert torch.equal(own[4], now[6])
        assert not now[4].any()
        assert not now[5].any()
    loaded = reloaded(result.model, tmp_path)
    assert torch.equal(logits(loaded, batch()), logits(result.model, batch()))


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_added_experts_are_trained(kind):
    model = mixture(kind, router=ROUTERS["soft"])
    result = surgery.add_experts(model, 1, freeze_old=True)
    new = result.model
    before = {n: p.detach().clone() for n, p in new.named_parameters()}
    new.train()
    trained = [p for p in new.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        new(**batch(), labels=labels_of(batch())).loss.backward()
        optimizer.step()
    olds = adapter_layers(model)
    for key, layer in adapter_layers(new).items():
        own, now = deltas(olds[key]), deltas(layer)
        kept = num_experts(olds[key])
        assert all(map(torch.equal, own[:kept], now[:kept]))
        assert torch.equal(own[-1], now[-1])
        if layer.moe_plans["default"].placement != "unrouted":
            assert now[4].any()
    for head in heads_of(new).values():
        names = [n for n, p in new.named_parameters() if p is head.router.weight]
        assert torch.equal(before[names[0]][:4], head.router.weight[:4])
        assert not torch.equal(before[names[0]][4], head.router.weight[4])


def test_surgery_leaves_the_mixture_alone():
    model = mixture("ffn")
    before = {n: p.clone() for n, p in model.named_parameters()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    surgery.merge_experts(model, 2)
    surgery.add_experts(model, freeze_old=True)
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


REFUSED = {
    "hash": {"router": {"name": "hash"}},
    "hierarchical": {"router": {"name": "hierarchical", "groups": 2}},
    "experts_pattern": {"experts_pattern": [2, 4]},
    "granularity": {"granularity": 2},
    "svd_segments": {"init_lora_weights": "svd_segments"},
    "rank1": {"experts": "rank1"},
    "ia3": {"experts": "ia3", "init_lora_weights": True},
}


@pytest.mark.parametrize(("word", "fields"), list(REFUSED.items()), ids=list(REFUSED))
def test_what_cannot_be_edited_is_refused(word, fields):
    model = adapted("llama", "layer", **fields)
    with pytest.raises(UnsupportedError, match=f"cannot edit single experts.*{word}"):
        surgery.drop_experts(model, [0])


WRONG = {
    "all": (lambda m: surgery.drop_experts(m, [0, 1, 2, 3]), "1 to 3"),
    "unknown": (lambda m: surgery.drop_experts(m, [4]), r"list each of 0\.\.3"),
    "nothing": (lambda m: surgery.drop_experts(m), "name the experts"),
    "no data": (lambda m: surgery.drop_experts(m, count=1), "data= is needed"),
    "too few for k": (lambda m: surgery.drop_experts(m, [0, 1, 2]), "k=2 is larger"),
    "short order": (lambda m: surgery.reorder_experts(m, [0, 1]), "must list each of the 4"),
    "twice": (lambda m: surgery.reorder_experts(m, [0, 0, 1, 2]), "at most once"),
    "wrong router": (lambda m: surgery.reorder_experts(m, {"x": [0]}), "list every router"),
    "merge none": (lambda m: surgery.merge_experts(m, 4), r"1\.\.3"),
    "add none": (lambda m: surgery.add_experts(m, 0), "at least 1"),
}


@pytest.mark.parametrize(("edit", "message"), list(WRONG.values()), ids=list(WRONG))
def test_a_wrong_edit_is_refused(edit, message):
    with pytest.raises(ConfigError, match=message):
        edit(mixture())


def test_a_smaller_k_lets_more_experts_go():
    result = surgery.drop_experts(mixture(), [0, 1, 2], router={"k": 1})
    assert result.model.peft_config["default"].router["k"] == 1


def test_ranks_that_would_differ_between_layers_are_refused():
    model = mixture(experts={"name": "heterogeneous", "ranks": [1, 4, 2, 3]})
    heads = [name.partition("/")[2] for name in heads_of(model)]
    order = {name: ([1, 0, 2, 3] if i else [0, 1, 2, 3]) for i, name in enumerate(heads)}
    with pytest.raises(UnsupportedError, match="different ranks"):
        surgery.reorder_experts(model, order)
