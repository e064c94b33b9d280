"""Loads the base model and tokenizer of a recipe."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HFValidationError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME

from moeadapt.embedded import find_model, resolve_model
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


def empty_base(
    run: RunArguments, objective: Objective, *, offline: bool = False
) -> PreTrainedModel:
    """Build the base model without weights, on the meta device, from its configuration.

    Args:
        run: names the model; of a built-in one nothing is downloaded.
        objective: decides its head.
        offline: read the configuration from this machine only.

    Raises:
        AssetError: the configuration cannot be read or downloaded.
    """
    built_in = find_model(run.model_name_or_path)
    if built_in is not None:
        config = AutoConfig.for_model(**built_in.config)
    else:
        with _readable(run):
            path = _on_this_machine(run) if offline else run.model_name_or_path
            config = AutoConfig.from_pretrained(
                path, revision=run.model_revision, trust_remote_code=False
            )
    if objective.task_type == "SEQ_CLS":
        config.num_labels = 1
    with torch.device("meta"):
        return _AUTO[objective.task_type].from_config(config)


def _on_this_machine(run: RunArguments) -> str:
    """Return a folder with the model's configuration, and never ask the network for it."""
    if Path(run.model_name_or_path).is_dir():
        return run.model_name_or_path
    try:
        # `hf_hub_download(local_files_only=True)` may still ask the network who is calling.
        found = try_to_load_from_cache(
            run.model_name_or_path, CONFIG_NAME, revision=run.model_revision
        )
    except HFValidationError:  # no name that the hub could have
        found = None
    if not isinstance(found, str):
        raise AssetError(
            f"the configuration of {run.model_name_or_path!r} is not on this machine: no such "
            f"folder, and revision {run.model_revision!r} is not in the hub cache {HF_HUB_CACHE}. "
            "`moeadapt plan` fetches it"
        )
    return str(Path(found).parent)


@contextmanager
def _readable(run: RunArguments) -> Iterator[None]:
    """Turn transformers' and the hub's errors into one of ours that names the model."""
    try:
        yield
    except AssetError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise AssetError(
            f"cannot load the base model {run.model_name_or_path!r}: {reason}. Check the name and "
            "the network, or give a local folder."
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
