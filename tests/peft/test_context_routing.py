"""Routers that look beyond a token, in whole models: sequences, token ids, generation."""

import copy

import pytest
import torch
from torch.testing import assert_close

import moeadapt
from moeadapt.errors import TrainingError, UnsupportedError
from moeadapt.routers import sequence
from tests.tiny import CASES, KINDS, adapted, batch, gradients, labels_of, logits, positions

SEQUENCE = {"name": "soft", "per": "sequence", "init_std": 0.5}
LOOKING = {
    "sequence": SEQUENCE,
    "hash": {"name": "hash", "k": 2},
    "expert_choice": {"name": "expert_choice", "init_std": 0.5},
}

cases = pytest.mark.parametrize(("name", "kind"), CASES)
kinds = pytest.mark.parametrize("kind", KINDS)
looking = pytest.mark.parametrize("router", LOOKING.values(), ids=LOOKING)


@cases
@looking
def test_a_padded_row_is_routed_as_it_is_alone(name, kind, router):
    model, inputs = adapted(name, kind, router=router), batch()
    together = model(**inputs, position_ids=positions(inputs["attention_mask"])).logits
    for row in range(3):
        alone = inputs["input_ids"][row : row + 1, 2 * row :]
        assert_close(together[row, 2 * row :], model(input_ids=alone).logits[0])


@kinds
@looking
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_packed_sequences_are_routed_as_they_are_alone(name, kind, router):
    model = adapted(name, kind, router=router)
    rows = [batch(1, length, seed=length)["input_ids"] for length in (5, 3, 7)]
    packed = torch.cat(rows, -1)
    places = torch.cat([torch.arange(row.shape[1]) for row in rows]).unsqueeze(0)
    # Without a cache transformers masks attention between the packed sequences.
    together = logits(model, {"input_ids": packed, "position_ids": places, "use_cache": False})
    alone = torch.cat([logits(model, {"input_ids": row}) for row in rows], 1)
    assert_close(together, alone)


@cases
@looking
def test_checkpointing_repeats_the_routing(name, kind, router):
    inputs, found = batch(), []
    for checkpointing in (None, True, False):
        model = adapted(name, kind, router=router).train()
        if checkpointing is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        found.append(gradients(model, inputs))
    plain, *others = found
    assert any(gradient.any() for gradient in plain.values())
    for other in others:
        for key, gradient in plain.items():
            assert_close(other[key], gradient)


@pytest.mark.parametrize("same", [True, False])
def test_two_forwards_of_other_tokens_before_one_backward_are_noticed(same):
    model = adapted("llama", "layer", router={"name": "hash"}).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    total = torch.zeros(())
    for seed in (0, 0 if same else 1):
        ids = batch(seed=seed)["input_ids"]
        total = total + model(input_ids=ids, labels=ids).loss
    if same:
        total.backward()
        return
    with pytest.raises(TrainingError, match="token ids"):
        total.backward()


# --- generation keeps the decision of the prompt


def full_forward(model, ids, mask, prompt, monkeypatch):
    """Return the logits of a forward without cache whose decisions look at the prompt only."""

    def mean_of_prompt(hidden, tokens):
        length = ids.shape[1]
        place = torch.arange(len(hidden)) % length
        return pooled(hidden, copy_with(tokens, mask=tokens.mask & (place < prompt)))

    pooled = sequence.mean_per_sequence
    with monkeypatch.context() as patch:
        patch.setattr(sequence, "mean_per_sequence", mean_of_prompt)
        return model(
            input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False
        ).logits


def copy_with(tokens, **fields):
    """Replace fields of a context."""
    from dataclasses import replace

    return replace(tokens, **fields)


@cases
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_keeps_the_decision_made_for_the_prompt(name, kind, beams, monkeypatch):
    model, inputs = adapted(name, kind, router=SEQUENCE), batch()
    prompt = inputs["input_ids"].shape[1]
    with torch.no_grad():
        out = model.generate(
            **inputs,
            max_new_tokens=6,
            eos_token_id=None,
            pad_token_id=0,
            do_sample=False,
            num_beams=beams,
            output_scores=True,
            output_logits=True,
            return_dict_in_generate=True,
        )
        ones = torch.ones(3, 6, dtype=torch.long)
        mask = torch.cat([inputs["attention_mask"], ones], -1)
        full = full_forward(model, out.sequences, mask, prompt, monkeypatch)
    if beams == 1:
        theirs = torch.stack(out.logits, 1)
        assert_close(theirs, full[:, prompt - 1 : -1], atol=1e-4, rtol=1e-4)
        return
    # A beam's score is the sum of its tokens' log-probabilities under the same decision.
    logp = full[:, prompt - 1 : -1].log_softmax(-1)
    own = logp.gather(-1, out.sequences[:, prompt:, None]).sum((1, 2)) / 6
    assert_close(out.sequences_scores, own, atol=1e-4, rtol=1e-4)


@kinds
def test_every_step_uses_the_weights_of_the_prompt(kind):
    model, inputs = adapted("llama", kind, router=SEQUENCE), batch()
    with moeadapt.collect_routing(model) as routings, torch.no_grad():
        model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    for collected in routings.values():
        prompt, *steps = collected
        last = prompt.weights.view(3, -1, prompt.num_experts)[:, -1]
        assert len(steps) == 3
        for step in steps:
            assert torch.equal(step.weights, last)
    assert (last[0] != last[1]).any()


def test_a_cache_made_by_the_model_itself_carries_the_decision():
    model, inputs = adapted("llama", "block", router=SEQUENCE), batch()
    with moeadapt.collect_routing(model) as routings, torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        for past in (cache, copy.deepcopy(cache)):
            model(input_ids=torch.full((3, 2), 7), past_key_values=past)
    for prompt, first, second in routings.values():
        last = prompt.weights.view(3, -1, 4)[:, -1]
        assert torch.equal(first.weights.view(3, 2, 4), last[:, None].expand(3, 2, 4))
        assert torch.equal(first.weights, second.weights)


def test_another_prompt_is_decided_afresh():
    model = adapted("llama", "block", router=SEQUENCE)
    found = []
    for seed in (0, 1, 0):
        with moeadapt.collect_routing(model) as routings, torch.no_grad():
            model.generate(**batch(seed=seed), max_new_tokens=2, do_sample=False)
        found.append(next(iter(routings.values()))[-1].weights)
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


def test_generation_without_a_cache_is_refused():
    model = adapted("llama", "layer", router=SEQUENCE)
    with pytest.raises(UnsupportedError, match="use_cache=True"):
        model.generate(**batch(), max_new_tokens=2, use_cache=False)


def test_a_cache_filled_without_the_adapter_is_refused():
    model, inputs = adapted("llama", "layer", router=SEQUENCE), batch()
    with torch.no_grad(), model.disable_adapter():
        cache = model(**inputs, use_cache=True).past_key_values
    with torch.no_grad(), pytest.raises(UnsupportedError, match="holds no decision"):
        model(input_ids=torch.full((3, 1), 7), past_key_values=cache)


@pytest.mark.parametrize("use_cache", [True, False])
@kinds
def test_a_router_that_looks_ahead_refuses_to_generate_and_says_why(kind, use_cache):
    model = adapted("llama", kind, router=LOOKING["expert_choice"])
    with pytest.raises(UnsupportedError, match="tokens that follow it"):
        model.generate(**batch(), max_new_tokens=2, use_cache=use_cache)


@kinds
def test_a_router_that_looks_ahead_evaluates(kind):
    model, inputs = adapted("llama", kind, router=LOOKING["expert_choice"]), batch()
    with torch.no_grad():
        assert torch.isfinite(model(**inputs, labels=labels_of(inputs)).loss)


@kinds
def test_a_hash_router_generates_as_the_full_forward(kind):
    model, inputs = adapted("llama", kind, router=LOOKING["hash"]), batch()
    with torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 5, dtype=torch.long)], -1)
        full = model(
            input_ids=out.sequences, attention_mask=mask, position_ids=positions(mask)
        ).logits
    start = inputs["input_ids"].shape[1] - 1
    assert_close(torch.stack(out.logits, 1), full[:, start:-1], atol=1e-4, rtol=1e-4)


def test_a_hash_router_needs_token_ids():
    model, inputs = adapted("llama", "layer", router=LOOKING["hash"]), batch()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with torch.no_grad(), pytest.raises(UnsupportedError, match="without input_ids"):
        model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
