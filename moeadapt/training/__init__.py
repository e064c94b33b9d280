"""Training by TRL: trainers, a mixin for other trainers, a callback for stock ones.

Public names are resolved on first use: the callback needs only transformers, the trainers need TRL.
"""

import importlib
from typing import TYPE_CHECKING, Any

from moeadapt.extras import needs_extra

if TYPE_CHECKING:
    from moeadapt.training.callback import MoeAdaptCallback as MoeAdaptCallback
    from moeadapt.training.metrics import router_metrics as router_metrics
    from moeadapt.training.mixin import MoETrainerMixin as MoETrainerMixin
    from moeadapt.training.param_groups import split_router_params as split_router_params
    from moeadapt.training.resume import find_checkpoint as find_checkpoint
    from moeadapt.training.trainers import MoEDPOTrainer as MoEDPOTrainer
    from moeadapt.training.trainers import MoEGRPOTrainer as MoEGRPOTrainer
    from moeadapt.training.trainers import MoEKTOTrainer as MoEKTOTrainer
    from moeadapt.training.trainers import MoERewardTrainer as MoERewardTrainer
    from moeadapt.training.trainers import MoERLOOTrainer as MoERLOOTrainer
    from moeadapt.training.trainers import MoESFTTrainer as MoESFTTrainer

_HOME = {
    "MoEDPOTrainer": "moeadapt.training.trainers",
    "MoEGRPOTrainer": "moeadapt.training.trainers",
    "MoEKTOTrainer": "moeadapt.training.trainers",
    "MoERLOOTrainer": "moeadapt.training.trainers",
    "MoERewardTrainer": "moeadapt.training.trainers",
    "MoESFTTrainer": "moeadapt.training.trainers",
    "MoETrainerMixin": "moeadapt.training.mixin",
    "MoeAdaptCallback": "moeadapt.training.callback",
    "find_checkpoint": "moeadapt.training.resume",
    "router_metrics": "moeadapt.training.metrics",
    "split_router_params": "moeadapt.training.param_groups",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'moeadapt.training' has no attribute {name!r}")
    with needs_extra():
        return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
