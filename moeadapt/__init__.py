"""Mixtures of LoRA experts with adaptive routers, as a PEFT method.

`import moeadapt` makes every entry point of PEFT and transformers able to load its adapters.
Public names are resolved on first use, so the command line starts without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from moeadapt import plugin as _plugin
from moeadapt.extras import needs_extra as _needs_extra
from moeadapt.version import __version__ as __version__

if TYPE_CHECKING:
    from moeadapt import errors as errors
    from moeadapt import evaluation as evaluation
    from moeadapt import interpret as interpret
    from moeadapt.adapter_format.options import loading_options as loading_options
    from moeadapt.balance import BALANCE as BALANCE
    from moeadapt.experts import EXPERTS as EXPERTS
    from moeadapt.export import surgery as surgery
    from moeadapt.export.export import export as export
    from moeadapt.export.merge import densify as densify
    from moeadapt.export.merge import merge as merge
    from moeadapt.export.split import split as split
    from moeadapt.export.upcycle import upcycle as upcycle
    from moeadapt.hub.push import push as push
    from moeadapt.presets import PRESETS as PRESETS
    from moeadapt.report.report import report as report
    from moeadapt.routers import ROUTERS as ROUTERS
    from moeadapt.routing import Routing as Routing
    from moeadapt.training.callback import MoeAdaptCallback as MoeAdaptCallback
    from moeadapt.training.distill import distill as distill
    from moeadapt.training.router_step import attach_optimizer as attach_optimizer
    from moeadapt.tuner.checked import load_adapter_checked as load_adapter_checked
    from moeadapt.tuner.config import MoeLoraConfig as MoeLoraConfig
    from moeadapt.tuner.from_adapters import init_from_adapters as init_from_adapters
    from moeadapt.tuner.init import init_routers_kmeans as init_routers_kmeans
    from moeadapt.tuner.inspect import after_optimizer_step as after_optimizer_step
    from moeadapt.tuner.inspect import collect_routing as collect_routing
    from moeadapt.tuner.inspect import set_aux_loss_scale as set_aux_loss_scale
    from moeadapt.tuner.inspect import step_schedule as step_schedule
    from moeadapt.tuner.override import override_routing as override_routing

_HOME = {
    "BALANCE": "moeadapt.balance",
    "EXPERTS": "moeadapt.experts",
    "MoeAdaptCallback": "moeadapt.training.callback",
    "MoeLoraConfig": "moeadapt.tuner.config",
    "PRESETS": "moeadapt.presets",
    "ROUTERS": "moeadapt.routers",
    "Routing": "moeadapt.routing",
    "after_optimizer_step": "moeadapt.tuner.inspect",
    "attach_optimizer": "moeadapt.training.router_step",
    "collect_routing": "moeadapt.tuner.inspect",
    "densify": "moeadapt.export.merge",
    "distill": "moeadapt.training.distill",
    "errors": "moeadapt",
    "evaluation": "moeadapt",
    "export": "moeadapt",
    "init_from_adapters": "moeadapt.tuner.from_adapters",
    "init_routers_kmeans": "moeadapt.tuner.init",
    "interpret": "moeadapt",
    "load_adapter_checked": "moeadapt.tuner.checked",
    "loading_options": "moeadapt.adapter_format.options",
    "merge": "moeadapt.export.merge",
    "override_routing": "moeadapt.tuner.override",
    "push": "moeadapt.hub.push",
    "report": "moeadapt",
    "set_aux_loss_scale": "moeadapt.tuner.inspect",
    "split": "moeadapt.export.split",
    "step_schedule": "moeadapt.tuner.inspect",
    "upcycle": "moeadapt.export.upcycle",
    "surgery": "moeadapt.export",
}

__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'moeadapt' has no attribute {name!r}")
    if name in ("errors", "evaluation", "export", "interpret", "report", "surgery"):
        return importlib.import_module(f"{_HOME[name]}.{name}")
    with _needs_extra():
        return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)


_plugin.watch_peft()
