"""Loads the base model and tokenizer of a recipe."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from moeadapt.embedded import resolve_model
from moeadapt.errors import AssetError
from moeadapt.training.objectives import Objective
from moeadapt.training.recipe import RunArguments

_AUTO = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
}


def load_base(
    run: RunArguments, objective: Objective
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the base model with the head that `objective` needs, and its tokenizer.

    Raises:
        AssetError: the model cannot be read or downloaded.
    """
    path = resolve_model(run.model_name_or_path)
    extra: dict[str, Any] = {"trust_remote_code": False}
    if objective.task_type == "SEQ_CLS":
        extra["num_labels"] = 1
    if run.attn_implementation:
        extra["attn_implementation"] = run.attn_implementation
    quantization = _quantization(run)
    if quantization is not None:
        extra["quantization_config"] = quantization
    with _readable(run):
        model = _AUTO[objective.task_type].from_pretrained(
            path, revision=run.model_revision, dtype=run.dtype, **extra
        )
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=run.model_revision, trust_remote_code=False
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def empty_base(run: RunArguments, objective: Objective) -> PreTrainedModel:
    """Build the base model without weights, on the meta device, from its configuration.

    Raises:
        AssetError: the configuration cannot be read or downloaded.
    """
    path = resolve_model(run.model_name_or_path)
    with _readable(run):
        config = AutoConfig.from_pretrained(
            path, revision=run.model_revision, trust_remote_code=False
        )
    if objective.task_type == "SEQ_CLS":
        config.num_labels = 1
    with torch.device("meta"):
        return _AUTO[objective.task_type].from_config(config)


@contextmanager
def _readable(run: RunArguments) -> Iterator[None]:
    """Turn transformers' and the hub's errors into one of ours that names the model."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise AssetError(
            f"cannot load the base model {run.model_name_or_path!r}: "
            f"{str(error).partition(chr(10))[0]}. Check the name and the network, or give a local "
            "folder."
        ) from error


def _quantization(run: RunArguments) -> Any:
    if not (run.load_in_4bit or run.load_in_8bit):
        return None
    from transformers import BitsAndBytesConfig

    if run.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
