"""Loads a written checkpoint as a user would, and compares it with its reference."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from moeadapt.errors import ExportError

PROBE_ROWS, PROBE_TOKENS, RESERVED = 2, 64, 3


def load_strictly(folder: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return the model of a checkpoint folder, in eval mode.

    Raises:
        ExportError: a tensor is missing, unexpected, of another shape, or could not be converted.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, local_files_only=True
    )
    model, info = loaded
    wrong = {kind: sorted(map(str, found)) for kind, found in info.items() if found}
    if wrong:
        shown = {kind: names[:3] for kind, names in wrong.items()}
        raise ExportError(f"{folder} does not load as {type(model).__name__}: {shown}")
    return model.eval()


def probe_ids(vocab_size: int, max_tokens: int, seed: int = 0) -> list[Tensor]:
    """Return random token ids: every token counts, and no text in any language is favoured."""
    generator = torch.Generator().manual_seed(seed)
    length = max(2, min(PROBE_TOKENS, max_tokens))
    ids = torch.randint(
        min(RESERVED, vocab_size - 1), vocab_size, (PROBE_ROWS, length), generator=generator
    )
    return list(ids)


def logits_of(model: PreTrainedModel, ids: Sequence[Tensor]) -> list[Tensor]:
    """Return the logits of each text."""
    with torch.no_grad():
        return [model(input_ids=text.reshape(1, -1), use_cache=False).logits for text in ids]
