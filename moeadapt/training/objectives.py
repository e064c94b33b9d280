"""What can be trained for: objective -> TRL's config and trainer, data columns, task type."""

import importlib
from dataclasses import dataclass
from typing import Any, Literal

from moeadapt.errors import ConfigError, did_you_mean

DataKind = Literal["completion", "preference", "labelled", "prompt"]
"""Rows of `completion`: prompt, completion; `preference`: prompt, chosen, rejected; `labelled`:
prompt, completion, label (good or bad); `prompt`: prompt and whatever the reward reads."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """One way to train.

    Attributes:
        name: public name.
        trl_name: stem of TRL's class names.
        data: which columns the trainer reads.
        task_type: PEFT's task type, which decides the model's head.
    """

    name: str
    trl_name: str
    data: DataKind
    task_type: Literal["CAUSAL_LM", "SEQ_CLS"] = "CAUSAL_LM"

    def config_class(self) -> type[Any]:
        """Return TRL's config class of this objective."""
        return getattr(importlib.import_module("trl"), f"{self.trl_name}Config")

    def trainer_class(self, *, is_mixture: bool = True) -> type[Any]:
        """Return our trainer, which is TRL's with `MoETrainerMixin`; for a plain LoRA TRL's own."""
        if not is_mixture:
            return getattr(importlib.import_module("trl"), f"{self.trl_name}Trainer")
        module = importlib.import_module("moeadapt.training.trainers")
        return getattr(module, f"MoE{self.trl_name}Trainer")


class _Objectives(dict[str, Objective]):
    def __missing__(self, name: str) -> Objective:
        raise ConfigError(
            f"unknown objective {name!r}; one of {sorted(self)}{did_you_mean(name, self)}"
        )


OBJECTIVES = _Objectives(
    {
        "sft": Objective(name="sft", trl_name="SFT", data="completion"),
        "dpo": Objective(name="dpo", trl_name="DPO", data="preference"),
        "kto": Objective(name="kto", trl_name="KTO", data="labelled"),
        "grpo": Objective(name="grpo", trl_name="GRPO", data="prompt"),
        "rloo": Objective(name="rloo", trl_name="RLOO", data="prompt"),
        "reward": Objective(
            name="reward", trl_name="Reward", data="preference", task_type="SEQ_CLS"
        ),
    }
)
"""The objectives by name."""
