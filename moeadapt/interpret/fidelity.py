"""How much of what the mixture gained does something simpler keep?"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from moeadapt.errors import ConfigError
from moeadapt.interpret.losses import as_batches, text_losses
from moeadapt.interpret.scope import adapter_off, choose_layers
from moeadapt.tuner.override import override_routing


@dataclass(frozen=True, kw_only=True)
class Approximation:
    """One simpler way of routing.

    Attributes:
        loss: in nats per token.
        kept: (base - loss) / (base - mixture): 1: all of the gain, 0: none, below 0: worse than
            the base, above 1: better than the mixture. None: there is no gain to keep.
    """

    loss: float
    kept: float | None


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """The losses that the approximations lie between.

    Attributes:
        base: loss of the model without the adapter (unrouted LoRAs included), in nats per token.
        mixture: loss as the model routes.
        approximations: by name.
    """

    base: float
    mixture: float
    approximations: dict[str, Approximation]


def fidelity(
    model: nn.Module,
    batches: Iterable[Any],
    approximations: Mapping[str, Mapping[str, Any]] | None = None,
) -> Fidelity:
    """Measure on the network's own loss what part of the improvement approximations keep.

    One pass over the batches for the base, one for the mixture, one per approximation.

    Args:
        model: the model, in any wrapper.
        batches: what to measure on, see `read_batches`.
        approximations: name -> arguments of `moeadapt.override_routing`; None: `top_1` (each
            token's most probable expert alone), `uniform` (all in equal shares) and `expert_<e>`
            (that one for every token), for the experts that every layer has.

    Raises:
        ConfigError: no mixture, or several, are active; an override cannot be; nothing to measure
            on.

    Example:
        >>> fidelity(model, batches).approximations["top_1"].kept
        >>> fidelity(model, batches, {"first two": {"force": [0, 1]}})
    """
    sizes = choose_layers(model)
    if approximations is None:
        approximations = {
            "top_1": {"k": 1},
            "uniform": {"router": "uniform"},
            **{f"expert_{e}": {"force": e} for e in range(min(sizes.values()))},
        }
    if not approximations:
        raise ConfigError("approximations is empty; name one, or None for the usual ones")
    for override in approximations.values():
        with override_routing(model, **override):
            pass  # refused before anything is measured
    data = as_batches(batches)
    with adapter_off(model):
        base = text_losses(model, data).mean
    mixture = text_losses(model, data).mean
    gain = base - mixture
    found = {}
    for name, override in approximations.items():
        with override_routing(model, **override):
            loss = text_losses(model, data).mean
        found[name] = Approximation(loss=loss, kept=(base - loss) / gain if gain > 0 else None)
    return Fidelity(base=base, mixture=mixture, approximations=found)
