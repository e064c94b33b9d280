"""Added experts, the mixture left alone, and the edits that are refused."""

import pytest
import torch

from moeadapt import surgery
from moeadapt.errors import ConfigError, UnsupportedError
from moeadapt.tuner.inspect import heads_of
from moeadapt.tuner.plain import adapter_layers
from tests.merge.dense import deltas, num_experts
from tests.merge.kit import KINDS, ROUTERS, mixture, reloaded
from tests.tiny import adapted, batch, labels_of, logits


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


TEXT = [batch()]
WRONG = {
    "all": (lambda m: surgery.drop_experts(m, [0, 1, 2, 3]), "1 to 3"),
    "unknown": (lambda m: surgery.drop_experts(m, [4]), r"list each of 0\.\.3"),
    "nothing": (lambda m: surgery.drop_experts(m), "name the experts"),
    "no data": (lambda m: surgery.drop_experts(m, count=1), "data= is needed"),
    "negative count": (lambda m: surgery.drop_experts(m, count=-1, data=TEXT), r"count=-1.*1\.\.3"),
    "count of none": (lambda m: surgery.drop_experts(m, count=0, data=TEXT), r"count=0.*1\.\.3"),
    "count of all": (lambda m: surgery.drop_experts(m, count=4, data=TEXT), r"count=4.*1\.\.3"),
    "unknown by": (lambda m: surgery.drop_experts(m, count=1, by="errors", data=TEXT), "'error'"),
    "by unused": (lambda m: surgery.drop_experts(m, [0], by="usage"), "leave it out"),
    "both": (lambda m: surgery.drop_experts(m, [0], count=1), "not both"),
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
