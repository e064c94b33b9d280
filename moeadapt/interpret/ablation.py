"""What does the loss rise by when an expert is removed?"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from moeadapt.errors import ConfigError
from moeadapt.interpret.losses import as_batches, text_losses
from moeadapt.interpret.scope import choose_experts, choose_layers, keep_weights, only_at, without
from moeadapt.tuner.override import override_routing

Removal = Literal["zero", "ban"]


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """Loss rises in nats per token; above 0: the model is worse without the expert.

    Attributes:
        loss: with all experts, in nats per token.
        by_layer: way of removal -> layer -> expert -> rise when it is removed from that layer.
        everywhere: way of removal -> expert -> rise when it is removed from all chosen layers at
            once.
    """

    loss: float
    by_layer: dict[str, dict[str, dict[int, float]]]
    everywhere: dict[str, dict[int, float]]


def ablation(
    model: nn.Module,
    batches: Iterable[Any],
    experts: Sequence[int] | None = None,
    layers: Sequence[str] | None = None,
    removals: Sequence[str] = ("zero", "ban"),
) -> Ablation:
    """Remove one expert at a time, in each layer and in all of them, and measure the loss.

    `zero`: its weight is set to 0 and the others keep theirs, so a token that used it is changed
    by less in sum. `ban`: the next most probable experts take its place and the token's weights
    sum to what they did. With `ban` the remaining weights are shared by probability; for a router
    whose weights are something else, this alone changes the loss.

    It costs a pass over the batches per removal, expert and layer, and one more per removal and
    expert for all layers.

    Args:
        model: the model, in any wrapper.
        batches: what to measure on, see `read_batches`.
        experts: which ones; None: all.
        layers: which layers or blocks, named as by `collect_routing`; None: all.
        removals: `zero`, `ban` or both.

    Returns:
        The rises. A layer with one expert has no entry under `ban`: nothing could take its place.

    Raises:
        ConfigError: no mixture, or several, are active; no such layer, expert or removal; nothing
            to measure on.

    Example:
        >>> rises = ablation(model, batches, experts=[0])
        >>> rises.everywhere["zero"][0]
    """
    sizes = choose_layers(model, layers)
    chosen = choose_experts(sizes, experts)
    unknown = [way for way in removals if way not in get_args(Removal)]
    if unknown or not removals:
        raise ConfigError(f"removals={list(removals)} must be some of {list(get_args(Removal))}")
    data = as_batches(batches)
    with override_routing(model, edit=keep_weights):
        loss = text_losses(model, data).mean

    def rise(way: str, expert: int, places: Sequence[str]) -> float:
        with _removed(model, way, expert, places):
            return text_losses(model, data).mean - loss

    found = {way: _rises(rise, way, sizes, chosen) for way in removals}
    return Ablation(
        loss=loss,
        by_layer={way: by_layer for way, (by_layer, _) in found.items()},
        everywhere={way: everywhere for way, (_, everywhere) in found.items()},
    )


def _rises(
    rise: Callable[[str, int, Sequence[str]], float],
    way: str,
    sizes: dict[str, int],
    chosen: dict[str, tuple[int, ...]],
) -> tuple[dict[str, dict[int, float]], dict[int, float]]:
    """Remove every chosen expert by layer, and everywhere."""
    can = {name: () if way == "ban" and sizes[name] == 1 else chosen[name] for name in sizes}
    by_layer = {name: {e: rise(way, e, [name]) for e in own} for name, own in can.items()}
    everywhere = {
        expert: rise(way, expert, [name for name in can if expert in can[name]])
        for expert in sorted({expert for own in can.values() for expert in own})
    }
    return by_layer, everywhere


def _removed(
    model: nn.Module, way: str, expert: int, layers: Sequence[str]
) -> AbstractContextManager[None]:
    if way == "ban":
        return override_routing(model, ban=expert, layers=layers)
    return override_routing(model, edit=only_at(layers, without([expert])))
