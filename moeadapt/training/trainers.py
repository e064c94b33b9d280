"""TRL's trainers with `MoETrainerMixin`; no loss is re-implemented."""

import trl

from moeadapt.training.mixin import MoETrainerMixin


class MoESFTTrainer(MoETrainerMixin, trl.SFTTrainer):
    """Supervised fine-tuning."""


class MoEDPOTrainer(MoETrainerMixin, trl.DPOTrainer):
    """Direct preference optimisation, on pairs of a chosen and a rejected answer."""


class MoEKTOTrainer(MoETrainerMixin, trl.KTOTrainer):
    """Kahneman-Tversky optimisation, on answers that are labelled good or bad."""


class MoEGRPOTrainer(MoETrainerMixin, trl.GRPOTrainer):
    """Group relative policy optimisation, on rewards of the model's own answers."""


class MoERLOOTrainer(MoETrainerMixin, trl.RLOOTrainer):
    """REINFORCE with a leave-one-out baseline, on rewards of the model's own answers."""


class MoERewardTrainer(MoETrainerMixin, trl.RewardTrainer):
    """A reward model, on pairs of a chosen and a rejected answer."""


__all__ = [
    "MoEDPOTrainer",
    "MoEGRPOTrainer",
    "MoEKTOTrainer",
    "MoERLOOTrainer",
    "MoERewardTrainer",
    "MoESFTTrainer",
]
