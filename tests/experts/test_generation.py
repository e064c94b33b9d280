"""What is kept between decoding steps: no stale matrix, nothing outside of a generation."""

import copy

import pytest
import torch
from torch.testing import assert_close

from moeadapt.experts.generation import Generation
from tests.structure.trace import recorded
from tests.tiny import adapted, batch


class Cache:
    """Stands in for a KV cache."""


def test_a_copy_is_made_once_per_generation():
    generation, matrix, cache = Generation(), torch.ones(3, 4), Cache()
    with torch.no_grad():
        assert not generation.keeps
        generation.enter(cache)
        assert generation.keeps
        first = generation.cast(matrix, torch.bfloat16)
        generation.enter(cache)
        assert generation.cast(matrix, torch.bfloat16) is first
        assert generation.cast(matrix, torch.float32) is matrix
        other = Cache()
        generation.enter(other)
        assert generation.cast(matrix, torch.bfloat16) is not first
    assert not generation.keeps  # gradients are on


def test_a_matrix_that_changed_is_cast_anew():
    generation, matrix, cache = Generation(), torch.ones(3, 4), Cache()
    with torch.no_grad():
        generation.enter(cache)
        generation.pack((matrix, matrix), torch.bfloat16)
        matrix.mul_(2)
        assert torch.equal(
            generation.pack((matrix, matrix), torch.bfloat16),
            torch.full((6, 4), 2.0, dtype=torch.bfloat16),
        )


def test_nothing_is_kept_when_the_cache_is_gone_or_a_forward_has_none():
    generation, cache = Generation(), Cache()
    with torch.no_grad():
        generation.enter(cache)
        generation.cast(torch.ones(2, 2), torch.bfloat16)
        del cache
        assert not generation.keeps
        cache = Cache()
        generation.enter(cache)
        generation.cast(torch.ones(2, 2), torch.bfloat16)
        generation.enter(None)
        assert not generation.keeps
        assert not generation._kept


def test_a_copy_of_a_model_keeps_nothing():
    generation, cache = Generation(), Cache()
    with torch.no_grad():
        generation.enter(cache)
        generation.cast(torch.ones(2, 2), torch.bfloat16)
        other = copy.deepcopy(generation)
        assert not other.keeps
        assert not other._kept


@pytest.mark.parametrize("kind", ["layer", "block", "ffn"])
def test_decoding_casts_no_matrix_after_its_first_step(kind):
    model = adapted("llama", kind)
    for name, parameter in model.named_parameters():
        if "moeadapt" not in name:
            parameter.data = parameter.data.bfloat16()
    for buffer in model.buffers():
        buffer.data = buffer.data.bfloat16() if buffer.is_floating_point() else buffer.data
    ids = batch(rows=1)["input_ids"]
    sizes = {p.numel() for n, p in model.named_parameters() if "moeadapt_lora" in n}
    with torch.no_grad():
        past = model(input_ids=ids, use_cache=True).past_key_values
        counts = []
        for _ in range(3):
            with recorded() as kernels:
                model(input_ids=ids[:, :1], past_key_values=past, use_cache=True)
            counts.append(sum(k.name == "_to_copy" and k.size in sizes for k in kernels))
    assert counts[0] > 0
    assert counts[1:] == [0, 0]


@pytest.mark.parametrize("kind", ["layer", "block", "ffn", "glu"])
def test_generated_text_follows_a_change_of_the_experts(kind):
    """Decoding step by step is one long forward, before and after the weights change."""
    model, ids = adapted("llama", kind), batch(rows=1, length=12)["input_ids"]
    for _ in range(2):
        with torch.no_grad():
            whole = model(input_ids=ids).logits
            past = model(input_ids=ids[:, :6], use_cache=True).past_key_values
            for at in range(6, 12):
                out = model(input_ids=ids[:, at : at + 1], past_key_values=past, use_cache=True)
                assert_close(out.logits[:, 0], whole[:, at], rtol=1e-4, atol=1e-4)
            for name, parameter in model.named_parameters():
                if "moeadapt" in name:
                    parameter.mul_(0.5)
