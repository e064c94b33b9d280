"""Which layers and experts a question is about, and the model without its adapter."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from moeadapt.errors import ConfigError, did_you_mean
from moeadapt.routing import Routing
from moeadapt.tuner.inspect import require_context
from moeadapt.tuner.layer import MoeLoraLinear
from moeadapt.tuner.override import Edit


def active_adapter(model: nn.Module) -> str:
    """Return the name of the one adapter that is switched on.

    Raises:
        ConfigError: the model has no mixture, it is switched off, or several are on.
    """
    require_context(model)
    layers = [module for module in model.modules() if isinstance(module, MoeLoraLinear)]
    names = sorted({name for layer in layers for name in layer.running_adapters()})
    if not names:
        raise ConfigError("the mixture is switched off; activate it with model.set_adapter(name)")
    if len(names) > 1:
        raise ConfigError(
            f"the adapters {names} are active together, so no number would say whose experts it "
            "is about; activate one with model.set_adapter(name)"
        )
    return names[0]


def choose_layers(model: nn.Module, layers: Sequence[str] | None = None) -> dict[str, int]:
    """Return layer or block -> number of its experts, in the order of the model.

    Args:
        model: the model, in any wrapper.
        layers: names as in `collect_routing`; None: all.

    Raises:
        ConfigError: see `active_adapter`; or `layers` is empty or names what does not route.
    """
    adapter = active_adapter(model)
    heads = require_context(model).heads[adapter]
    experts = {name: head.router.num_experts for name, head in heads.items()}
    if layers is None:
        return experts
    if isinstance(layers, str) or not layers:
        raise ConfigError(f"layers={layers!r} must be a non-empty list of names, or None for all")
    for name in layers:
        if name not in experts:
            hint = did_you_mean(name, experts)
            raise ConfigError(f"no router at {name!r}{hint}; this model has {sorted(experts)}")
    return {name: count for name, count in experts.items() if name in set(layers)}


def choose_experts(
    layers: dict[str, int], experts: Sequence[int] | None = None
) -> dict[str, tuple[int, ...]]:
    """Return layer -> the experts asked about; None: all that it has.

    Raises:
        ConfigError: `experts` is empty, repeats one, or one exists in none of the layers.
    """
    if experts is None:
        return {name: tuple(range(count)) for name, count in layers.items()}
    most = max(layers.values())
    if isinstance(experts, int) or not list(experts) or len(set(experts)) != len(list(experts)):
        raise ConfigError(f"experts={experts!r} must be a non-empty list without repetition")
    for expert in experts:
        if not 0 <= expert < most:
            raise ConfigError(f"experts={list(experts)}: there are the experts 0 to {most - 1}")
    return {name: tuple(e for e in experts if e < count) for name, count in layers.items()}


def keep_weights(_: str, routing: Routing) -> torch.Tensor:
    """Edit nothing: the learned weights, computed in the form that every edit is computed in."""
    return routing.expert_weights


def without(experts: Sequence[int]) -> Edit:
    """Return the edit that sets the weights of `experts` to zero and leaves the others alone."""

    def edit(_: str, routing: Routing) -> torch.Tensor:
        weights = routing.expert_weights.clone()
        weights[:, [e for e in experts if e < weights.shape[1]]] = 0
        return weights

    return edit


def only_at(layers: Iterable[str], edit: Edit) -> Edit:
    """Return the edit that changes the weights of `layers` and keeps those of all others.

    Every layer is edited then, so that all compute in one form and a difference of two losses
    holds no rounding of another one.
    """
    places = frozenset(layers)

    def some(layer: str, routing: Routing) -> torch.Tensor:
        return edit(layer, routing) if layer in places else keep_weights(layer, routing)

    return some


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Run the base model inside the `with` block: no expert, no unrouted LoRA, no saved module.

    Unlike PEFT's `disable_adapter`, which switches gradients, it leaves no trace.
    """
    modules = [module for module in model.modules() if _SWITCH in vars(module)]
    before = [getattr(module, _SWITCH) for module in modules]
    for module in modules:
        setattr(module, _SWITCH, True)
    try:
        yield
    finally:
        for module, off in zip(modules, before, strict=True):
            setattr(module, _SWITCH, off)


# PEFT's own field, of tuner layers and of modules_to_save alike.
_SWITCH = "_disable_adapters"
