"""Experts: what one expert adds to a linear layer. One file per type, one line here."""

from moeadapt.experts.base import BankSize, ExpertBank, ExpertConfig, Factor
from moeadapt.experts.glu import GluConfig
from moeadapt.experts.heterogeneous import HeterogeneousConfig
from moeadapt.experts.ia3 import Ia3Config
from moeadapt.experts.lora import LoraConfig
from moeadapt.experts.random_a import RandomAConfig
from moeadapt.experts.rank1 import Rank1Config
from moeadapt.experts.shared_a import SharedAConfig
from moeadapt.experts.shared_b import SharedBConfig
from moeadapt.registry import Registry

EXPERTS: Registry[ExpertConfig] = Registry(
    "expert",
    {
        "glu": GluConfig,
        "heterogeneous": HeterogeneousConfig,
        "ia3": Ia3Config,
        "lora": LoraConfig,
        "random_a": RandomAConfig,
        "rank1": Rank1Config,
        "shared_a": SharedAConfig,
        "shared_b": SharedBConfig,
    },
)

FACTOR_NAMES = tuple(sorted({name for cls in EXPERTS.values() for name in cls.bank.factor_names}))
"""Every factor of every expert type: the tensors a layer may have to own."""

__all__ = ["EXPERTS", "FACTOR_NAMES", "BankSize", "ExpertBank", "ExpertConfig", "Factor"]
