"""Mixtures of LoRA experts with adaptive routers, as a PEFT method.

`import moeadapt` makes every entry point of PEFT and transformers able to load its adapters.
Public names are resolved on first use, so the command line starts without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from moeadapt import plugin as _plugin
from moeadapt.version import __version__ as __version__

if TYPE_CHECKING:
    from moeadapt import errors as errors
    from moeadapt.balance import BALANCE as BALANCE
    from moeadapt.experts import EXPERTS as EXPERTS
    from moeadapt.routers import ROUTERS as ROUTERS
    from moeadapt.routing import Routing as Routing
    from moeadapt.training.callback import MoeAdaptCallback as MoeAdaptCallback
    from moeadapt.tuner.config import MoeLoraConfig as MoeLoraConfig
    from moeadapt.tuner.inspect import collect_routing as collect_routing
    from moeadapt.tuner.inspect import set_aux_loss_scale as set_aux_loss_scale

_HOME = {
    "BALANCE": "moeadapt.balance",
    "EXPERTS": "moeadapt.experts",
    "MoeAdaptCallback": "moeadapt.training.callback",
    "MoeLoraConfig": "moeadapt.tuner.config",
    "ROUTERS": "moeadapt.routers",
    "Routing": "moeadapt.routing",
    "collect_routing": "moeadapt.tuner.inspect",
    "errors": "moeadapt",
    "set_aux_loss_scale": "moeadapt.tuner.inspect",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'moeadapt' has no attribute {name!r}")
    if name == "errors":
        return importlib.import_module("moeadapt.errors")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)


_plugin.watch_peft()
