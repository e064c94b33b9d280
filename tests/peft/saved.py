"""An adapter on disk, made once, and what it must compute."""

from dataclasses import dataclass

from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.tiny import moe_config


@dataclass(frozen=True)
class Saved:
    """A base model and an adapter on disk, and the logits of both over `batch()`."""

    name: str
    kind: str
    base_dir: str
    adapter_dir: str
    inputs: dict[str, Tensor]
    base_logits: Tensor
    logits: Tensor

    def base(self) -> PreTrainedModel:
        """Load the base model."""
        return AutoModelForCausalLM.from_pretrained(self.base_dir).eval()

    def fresh(self) -> PeftModel:
        """Return the base model with an adapter of the same settings and other weights."""
        return get_peft_model(self.base(), moe_config(self.kind)).eval()
