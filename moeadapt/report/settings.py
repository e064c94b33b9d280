"""What was asked for, in words: the settings of an adapter and the versions that ran."""

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from peft import PeftModel

from moeadapt.balance import BALANCE
from moeadapt.embedded import name_of
from moeadapt.experts import EXPERTS
from moeadapt.routers import ROUTERS
from moeadapt.tuner.plain import adapter_config
from moeadapt.version import __version__


def settings_of(model: PeftModel, adapter: str) -> dict[str, str]:
    """Return what an adapter was asked to be, one line each, in the order to show them."""
    config = adapter_config(model, adapter)
    asked: dict[str, Any] = {
        "base": name_of(config.base_model_name_or_path or type(model.get_base_model()).__name__),
        "placement": config.placement,
        "router": _component(config.router, ROUTERS),
        "router scope": config.router_scope,
        "experts": _component(config.experts, EXPERTS),
        "number of experts": config.experts_pattern or config.num_experts,
        "granularity": config.granularity if config.granularity > 1 else None,
        "shared experts": config.n_shared or None,
        "rank of an expert": config.r,
        "alpha": f"{config.lora_alpha:g}",
        "balance": _balance(config.balance),
        "schedule": config.schedule,
        "targets": _targets(config.target_modules),
    }
    return {name: str(value) for name, value in asked.items() if value is not None}


def versions() -> dict[str, str]:
    """Return the versions that decide what a model computes."""
    others = {name: version(name) for name in ("torch", "transformers", "peft")}
    return {"moeadapt": __version__, **others, "python": platform.python_version()}


def _component(given: Any, registry: Mapping[str, Any]) -> str:
    """Return `name (option value, ...)`: k, a coefficient, and what is not as it is by default."""
    fields = registry[given["name"]].model_fields
    options = [
        f"{option} {value}"
        for option, value in given.items()
        if option in fields and (option in ("k", "coef") or value != fields[option].default)
    ]
    return f"{given['name']} ({', '.join(options)})" if options else str(given["name"])


def _balance(given: Mapping[str, Any] | None) -> str:
    each = [
        _component({"name": name, **options}, BALANCE)
        if isinstance(options, Mapping)
        else f"{name} ({options})"
        for name, options in (given or {}).items()
    ]
    return ", ".join(each) or "none"


def _targets(given: Any) -> str | None:
    """Return the last parts of the names, each once."""
    if given is None or isinstance(given, str):
        return given
    return ", ".join(sorted({name.rpartition(".")[2] for name in given}))
