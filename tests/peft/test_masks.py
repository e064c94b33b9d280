"""Which tokens a router counts: padding never, and never by the mask of another forward."""

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.testing import assert_close

from moeadapt import collect_routing
from moeadapt.routing import Routing
from tests.tiny import CASES, KINDS, adapted, batch, positions

BACKBONES = {"llama": "model", "gpt2": "transformer", "opt": "model"}


def _routings(model: nn.Module, call: nn.Module, **inputs) -> list[Routing]:
    with collect_routing(model) as found, torch.no_grad():
        call(**inputs)
    assert found
    assert {len(routings) for routings in found.values()} == {1}
    return [routings[0] for routings in found.values()]


def _backbone(model: PeftModel, name: str) -> nn.Module:
    return getattr(model.get_base_model(), BACKBONES[name])


def _is(routing: Routing, mask: Tensor) -> bool:
    return routing.token_mask is not None and torch.equal(
        routing.token_mask, mask.reshape(-1).bool()
    )


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_router_sees_the_padding_mask(name: str, kind: str) -> None:
    model, inputs = adapted(name, kind), batch()
    assert all(_is(r, inputs["attention_mask"]) for r in _routings(model, model, **inputs))


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_a_mask_given_by_position_is_seen(name: str) -> None:
    model, inputs = adapted(name, "layer"), batch()
    before = [None] if name == "gpt2" else []  # its second argument is the cache
    arguments = [inputs["input_ids"], *before, inputs["attention_mask"]]
    found = _routings(model, lambda: model.get_base_model()(*arguments))
    assert all(_is(r, inputs["attention_mask"]) for r in found)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_without_a_mask_every_token_is_real(name: str, kind: str) -> None:
    model = adapted(name, kind)
    found = _routings(model, model, input_ids=batch()["input_ids"])
    assert all(r.token_mask is None for r in found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_the_backbone_alone_does_not_use_an_earlier_mask(name: str, kind: str) -> None:
    model, inputs = adapted(name, kind), batch()
    backbone = _backbone(model, name)
    model(**inputs)
    found = _routings(model, backbone, input_ids=inputs["input_ids"])
    assert all(r.token_mask is None for r in found)
    own = inputs["attention_mask"].flip(0)
    found = _routings(model, backbone, input_ids=inputs["input_ids"], attention_mask=own)
    assert all(_is(r, own) for r in found)


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_a_forward_that_failed_leaves_no_mask_behind(name: str) -> None:
    model, inputs = adapted(name, "layer"), batch()
    backbone = _backbone(model, name)

    def fail(*_: object) -> None:
        raise RuntimeError("on purpose")

    last = list(backbone.modules())[-1]
    handle = last.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        model(**inputs)
    handle.remove()
    found = _routings(model, backbone, input_ids=inputs["input_ids"])
    assert all(r.token_mask is None for r in found)


@pytest.mark.parametrize("kind", KINDS)
def test_with_a_cache_the_mask_of_the_new_tokens_counts(kind: str) -> None:
    model, inputs = adapted("llama", kind), batch(rows=3, length=9)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    past = None
    for start, end in ((0, 3), (3, 8), (8, 9)):
        step = {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end]}
        with collect_routing(model) as found, torch.no_grad():
            past = model(**step, past_key_values=past, use_cache=True).past_key_values
        assert all(_is(r[0], mask[:, start:end]) for r in found.values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_four_dimensional_mask_counts_every_token(kind: str) -> None:
    model, inputs = adapted("llama", kind), batch()
    length = inputs["input_ids"].shape[1]
    causal = torch.ones(3, 1, length, length, dtype=torch.bool).tril()
    found = _routings(model, model, input_ids=inputs["input_ids"], attention_mask=causal)
    assert all(r.token_mask is None for r in found)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_what_stands_in_the_padding_changes_no_gradient(name: str, kind: str) -> None:
    """The balance loss of the padded batch is that of its real tokens."""
    balance = {"switch": 0.5, "z_loss": 0.5}
    model = adapted(name, kind, balance=balance).double().train()
    inputs = batch()
    padding = inputs["attention_mask"] == 0
    # The first real token is predicted from padding, so it must not be a label.
    labels = inputs["input_ids"].masked_fill(positions(inputs["attention_mask"]) == 0, -100)
    found = []
    for filler in (0, 77):
        model.zero_grad()
        ids = inputs["input_ids"].masked_fill(padding, filler)
        model(input_ids=ids, attention_mask=inputs["attention_mask"], labels=labels).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for parameter, expected in found[0].items():
        assert_close(found[1][parameter], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_routings_are_named_by_layer_or_block(kind: str) -> None:
    model = adapted("llama", kind)
    with collect_routing(model) as found:
        model(**batch())
    blocks = {f"model.layers.{i}.{b}" for i in (0, 1) for b in ("self_attn", "mlp")}
    expected = {
        "layer": set(model.base_model.targeted_module_names),
        "block": blocks,
        "ffn": {b for b in blocks if b.endswith("mlp")},
        "glu": {b for b in blocks if b.endswith("mlp")},
    }
    assert set(found) == expected[kind]
