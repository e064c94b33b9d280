"""An adapter on disk, made once, and what it must compute."""

import copy
from dataclasses import dataclass

from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from tests.tiny import moe_config


@dataclass(frozen=True)
class Saved:
    """A base model and an adapter on disk, and the logits of both over `batch()`.

    Attributes:
        loaded: the base as `from_pretrained` gave it; never wrapped, only copied.
    """

    name: str
    kind: str
    loaded: PreTrainedModel
    adapter_dir: str
    inputs: dict[str, Tensor]
    base_logits: Tensor
    logits: Tensor

    def base(self) -> PreTrainedModel:
        """Return a copy of the base model, faster than loading it again."""
        return copy.deepcopy(self.loaded)

    def fresh(self) -> PeftModel:
        """Return the base model with an adapter of the same settings and other weights."""
        return get_peft_model(self.base(), moe_config(self.kind)).eval()
