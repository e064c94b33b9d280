"""Experts: what one expert adds to a linear layer. One file per type, one line here."""

from moeadapt.experts.base import BankSize, ExpertBank, ExpertConfig, Factor
from moeadapt.experts.lora import LoraConfig
from moeadapt.registry import Registry

EXPERTS: Registry[ExpertConfig] = Registry(
    "expert",
    {
        "lora": LoraConfig,
    },
)

FACTOR_NAMES = tuple(sorted({name for cls in EXPERTS.values() for name in cls.bank.factor_names}))
"""Every factor of every expert type: the tensors a layer may have to own."""

__all__ = ["EXPERTS", "FACTOR_NAMES", "BankSize", "ExpertBank", "ExpertConfig", "Factor"]
