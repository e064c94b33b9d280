"""Every router with every expert type in every placement: it works as a whole, or says why not."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close

from moeadapt import ROUTERS
from moeadapt.errors import ConfigError, UnsupportedError
from moeadapt.tuner.combinations import PLACEMENTS, combinations, expert_spec, markdown
from tests.tiny import adapt, batch, labels_of, logits, moe_config, tiny

PAGE = Path(__file__).parents[2] / "docs/combinations.md"
ALL = list(combinations())
WORKING = [one for one in ALL if one.refusal is None]
REFUSED = [one for one in ALL if one.refusal is not None]


def label(one):
    """Name a case."""
    return f"{one.router}-{one.experts}-{one.placement.replace(', ', '_')}"


def fields_of(one):
    """Return the config fields of a combination on a tiny model."""
    router = {"name": one.router} | ({"init_std": 0.5} if has_gate(one.router) else {})
    return {
        "r": 4,
        "num_experts": 4,
        "router": router | ({"k": 3} if one.router == "rank_wise" else {}),
        "experts": expert_spec(one.experts, 4, 4),
        **PLACEMENTS[one.placement],
    }


def has_gate(name):
    """Whether a router has a gate to initialise."""
    return "init_std" in ROUTERS[name].model_fields


@pytest.mark.parametrize("one", WORKING, ids=label)
def test_it_trains_saves_loads_and_generates(one, tmp_path):
    base = tiny("llama", num_hidden_layers=1)
    model = adapt(base, moe_config("layer", **fields_of(one))).train()
    inputs = batch()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    model(**inputs, labels=labels_of(inputs)).loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in trained.values())
    optimizer.step()
    assert any(not torch.equal(before[n], p) for n, p in trained.items() if "router" not in n)
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny("llama", num_hidden_layers=1), tmp_path).eval()
    expected = logits(model, inputs)
    assert torch.equal(logits(again, inputs), expected)
    with model.disable_adapter():
        assert (logits(model, inputs) - expected).abs().max() > 0
    if one.router == "expert_choice":
        with pytest.raises(UnsupportedError):
            again.generate(**inputs, max_new_tokens=2)
        return
    out = again.generate(
        **inputs,
        max_new_tokens=2,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert_close(out.logits[0], expected[:, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("one", REFUSED, ids=label)
def test_it_is_refused_with_a_reason_before_the_model_is_touched(one):
    fields = {**fields_of(one), "balance": None}
    with pytest.raises(ConfigError) as caught:
        moe_config("layer", **fields)
    assert len(str(caught.value)) > 40


def test_the_committed_page_is_up_to_date():
    assert PAGE.read_text() == markdown(), "run `make docs`"


def test_most_combinations_work():
    # Small FFNs are the only experts of their placement, and have no other.
    refused = [one for one in REFUSED if (one.experts == "glu") == (one.placement == "glu")]
    assert len(WORKING) > 2 * len(refused)
