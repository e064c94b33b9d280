"""How good is each expert alone, domain by domain?

Letters: E experts, D domains.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from moeadapt.errors import ConfigError
from moeadapt.interpret.losses import TextLosses, as_batches, text_losses
from moeadapt.interpret.scope import choose_experts, choose_layers
from moeadapt.tuner.override import override_routing
from moeadapt.tuner.probe import Batch


@dataclass(frozen=True, kw_only=True)
class ProbedExperts:
    """Losses in nats per token.

    Attributes:
        domains: names [D], sorted.
        experts: the experts that were probed [E].
        alone: loss of each expert alone on each domain [E, D].
        learned: loss of the learned routing on each domain [D].
    """

    domains: tuple[str, ...]
    experts: tuple[int, ...]
    alone: tuple[tuple[float, ...], ...]
    learned: tuple[float, ...]


def probe_experts(
    model: nn.Module,
    batches: Iterable[Any] | Mapping[str, Iterable[Any]],
    experts: Sequence[int] | None = None,
) -> ProbedExperts:
    """Send every token of every layer to one expert, and measure each domain.

    One pass over the batches per expert, and one as the model routes.

    Args:
        model: the model, in any wrapper.
        batches: name of a domain -> its batches; or batches whose rows are labelled.
        experts: which ones; None: those that every layer has.

    Raises:
        ConfigError: no mixture, or several, are active; an expert lacks in some layer; a row has
            no domain, or a domain no token to predict.

    Example:
        >>> probe_experts(model, {"code": code, "prose": prose}).alone
    """
    sizes = choose_layers(model)
    common = {"every layer": min(sizes.values())}
    chosen = choose_experts(common, experts)["every layer"]
    data = _labelled(batches)
    learned = text_losses(model, data)
    names = tuple(sorted({str(name) for name in learned.domains}))
    for name, tokens in zip(names, _sums(learned, names, learned.tokens.tolist()), strict=True):
        if not tokens:
            raise ConfigError(f"no token of the domain {name!r} has a label to measure")
    alone = []
    for expert in chosen:
        with override_routing(model, force=expert):
            alone.append(_means(text_losses(model, data), names))
    return ProbedExperts(
        domains=names, experts=chosen, alone=tuple(alone), learned=_means(learned, names)
    )


def _labelled(batches: Iterable[Any] | Mapping[str, Iterable[Any]]) -> list[Batch]:
    if isinstance(batches, Mapping):
        if not batches:
            raise ConfigError("data is empty")
        return [
            replace(batch, domains=(str(name),) * len(batch.labels))
            for name, own in batches.items()
            for batch in as_batches(own)
        ]
    data = as_batches(batches)
    if any(batch.domains is None for batch in data):
        raise ConfigError(
            "the batches have no domains; give {name of domain: batches}, or "
            "read_batches(..., domains=one name per row)"
        )
    return data


def _means(losses: TextLosses, names: tuple[str, ...]) -> tuple[float, ...]:
    nll = _sums(losses, names, losses.nll.tolist())
    tokens = _sums(losses, names, losses.tokens.tolist())
    return tuple(a / b for a, b in zip(nll, tokens, strict=True))


def _sums(losses: TextLosses, names: tuple[str, ...], values: list[float]) -> list[float]:
    rows = list(zip(losses.domains, values, strict=True))
    return [sum(value for domain, value in rows if domain == name) for name in names]
