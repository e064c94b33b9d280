"""Routers: hidden states in, a `Routing` out. One file per router, one line here."""

from moeadapt.registry import Registry
from moeadapt.routers.base import Router, RouterConfig
from moeadapt.routers.cosine import CosineConfig
from moeadapt.routers.dynamic import DynamicConfig
from moeadapt.routers.expert_choice import ExpertChoiceConfig
from moeadapt.routers.gumbel import GumbelConfig
from moeadapt.routers.hash import HashConfig
from moeadapt.routers.hierarchical import HierarchicalConfig
from moeadapt.routers.linear import LinearRouter
from moeadapt.routers.random import RandomConfig
from moeadapt.routers.rank_wise import RankWiseConfig
from moeadapt.routers.relu import ReluConfig
from moeadapt.routers.sequence import route
from moeadapt.routers.sigmoid import SigmoidConfig
from moeadapt.routers.soft import SoftConfig
from moeadapt.routers.sparsegen import SparsegenConfig
from moeadapt.routers.sparsemax import SparsemaxConfig
from moeadapt.routers.switch import SwitchConfig
from moeadapt.routers.threshold import ThresholdConfig
from moeadapt.routers.top_k import TopKConfig
from moeadapt.routers.top_p import TopPConfig
from moeadapt.routers.uniform import UniformConfig

ROUTERS: Registry[RouterConfig] = Registry(
    "router",
    {
        "cosine": CosineConfig,
        "dynamic": DynamicConfig,
        "expert_choice": ExpertChoiceConfig,
        "gumbel": GumbelConfig,
        "hash": HashConfig,
        "hierarchical": HierarchicalConfig,
        "random": RandomConfig,
        "rank_wise": RankWiseConfig,
        "relu": ReluConfig,
        "sigmoid": SigmoidConfig,
        "soft": SoftConfig,
        "sparsegen": SparsegenConfig,
        "sparsemax": SparsemaxConfig,
        "switch": SwitchConfig,
        "threshold": ThresholdConfig,
        "top_k": TopKConfig,
        "top_p": TopPConfig,
        "uniform": UniformConfig,
    },
)

__all__ = ["ROUTERS", "LinearRouter", "Router", "RouterConfig", "route"]
