"""Generation with a KV cache and left padding against the full forward, for every model."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.tiny import CASES, adapted, batch, positions

pytestmark = pytest.mark.parametrize(("name", "kind"), CASES)

NEW = 5
"""Generated tokens; there is no end of sequence, so every row has as many."""


def _generate(model: torch.nn.Module, inputs: dict[str, Tensor], **options: Any) -> Any:
    return model.generate(
        **inputs,
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        return_dict_in_generate=True,
        **options,
    )


def _full_logits(model: torch.nn.Module, sequences: Tensor, mask: Tensor) -> Tensor:
    """Logits of the new tokens, all positions at once and without a cache."""
    mask = torch.cat([mask, mask.new_ones(mask.shape[0], NEW - 1)], 1)
    with torch.no_grad():
        out = model(
            input_ids=sequences[:, :-1],
            attention_mask=mask,
            position_ids=positions(mask),
            use_cache=False,
        )
    return out.logits[:, -NEW:]


def test_greedy_with_a_cache_equals_the_full_forward(name: str, kind: str) -> None:
    model, inputs = adapted(name, kind), batch()
    out = _generate(model, inputs, output_logits=True)
    full = _full_logits(model, out.sequences, inputs["attention_mask"])
    assert_close(torch.stack(out.logits, 1), full, atol=1e-4, rtol=1e-4)
    assert torch.equal(out.sequences[:, -NEW:], full.argmax(-1))


def test_beam_search_scores_equal_the_full_forward(name: str, kind: str) -> None:
    model, inputs = adapted(name, kind), batch()
    out = _generate(model, inputs, num_beams=3, num_return_sequences=2, output_scores=True)
    mask = inputs["attention_mask"].repeat_interleave(2, 0)
    full = _full_logits(model, out.sequences, mask).log_softmax(-1)
    chosen = full.gather(-1, out.sequences[:, -NEW:, None]).squeeze(-1)
    assert_close(out.sequences_scores, chosen.sum(1) / NEW, atol=1e-4, rtol=1e-4)


def test_padding_does_not_change_what_a_row_generates(name: str, kind: str) -> None:
    model, inputs = adapted(name, kind), batch()
    together = _generate(model, inputs).sequences[:, -NEW:]
    for row, mask in enumerate(inputs["attention_mask"]):
        ids = inputs["input_ids"][row, mask.bool()][None]
        alone = _generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        assert torch.equal(alone.sequences[0, -NEW:], together[row])
