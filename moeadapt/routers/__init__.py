"""Routers: hidden states in, a `Routing` out. One file per router, one line here."""

from moeadapt.registry import Registry
from moeadapt.routers.base import Router, RouterConfig
from moeadapt.routers.random import RandomConfig
from moeadapt.routers.top_k import TopKConfig
from moeadapt.routers.uniform import UniformConfig

ROUTERS: Registry[RouterConfig] = Registry(
    "router",
    {
        "random": RandomConfig,
        "top_k": TopKConfig,
        "uniform": UniformConfig,
    },
)

__all__ = ["ROUTERS", "Router", "RouterConfig"]
