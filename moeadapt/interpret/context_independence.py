"""How much of the choice of an expert does the token id alone decide?

Source: the question is that of Xue et al. 2024 (OpenMoE), https://arxiv.org/abs/2402.01739
("context-independent specialization"); the share of entropy explained is Theil's
uncertainty coefficient, adjusted for chance as in Vinh, Epps and Bailey 2010.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moeadapt.errors import ConfigError
from moeadapt.interpret.information import Information, compare_with_chance, shuffled
from moeadapt.interpret.losses import as_batches
from moeadapt.interpret.observe import observe
from moeadapt.interpret.scope import choose_layers

# Bits: what is left of an entropy that chance explains in full.
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class LayerIndependence:
    """One layer or block.

    Attributes:
        share: I(expert; token id) / H(expert), 0: the id says nothing, 1: it says all. None: all
            tokens have the same main expert, and nothing is to be explained.
        adjusted: the same above chance, (I - I_0) / (H - I_0) with I_0 the mean over
            permutations: about 0 if the id says nothing, however rare ids are. None: as `share`,
            or chance explains everything.
        information: both parts, and the p-value.
    """

    share: float | None
    adjusted: float | None
    information: Information


@dataclass(frozen=True, kw_only=True)
class ContextIndependence:
    """Every chosen layer.

    Attributes:
        coverage: share of the real tokens whose id was seen often enough to count.
        layers: layer or block -> its shares.
    """

    coverage: float
    layers: dict[str, LayerIndependence]


def context_independence(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    min_count: int = 5,
    layers: Sequence[str] | None = None,
    permutations: int = 200,
    seed: int = 0,
) -> ContextIndependence:
    """Measure how well a table from token id to main expert would do. One pass.

    Ids are permuted token by token, as if tokens of one text were independent. They are not, so
    p-values are too small: believe `adjusted`, not a small p.

    Args:
        model: the model, in any wrapper.
        batches: what to measure on, see `read_batches`.
        min_count: how often an id must be seen for its tokens to count; at least 2.
        layers: layers or blocks, named as by `collect_routing`; None: all.
        permutations: for chance, at least 1.
        seed: of the permutations.

    Raises:
        ConfigError: no mixture, or several, are active; no such layer; no id is seen so often; no
            data.
        UnsupportedError: a layer does not route these tokens one by one.

    Example:
        >>> context_independence(model, batches).layers["model.layers.0.mlp"].adjusted
    """
    names = list(choose_layers(model, layers))
    if min_count < 2:  # noqa: PLR2004
        raise ConfigError(f"min_count={min_count} must be 2 or more: one token is its own id")
    seen = observe(model, as_batches(batches), names)
    _, ids, counts = torch.unique(seen.token_ids, return_inverse=True, return_counts=True)
    often = counts[ids] >= min_count
    if not bool(often.any()):
        raise ConfigError(
            f"no token id is seen {min_count} times in {len(ids)} tokens; give more data, or a "
            "smaller min_count"
        )
    labels = ids[often]
    experts = {name: own[often] for name, own in seen.main_experts().items()}
    found = compare_with_chance(labels, experts, shuffled(labels), permutations, seed)
    return ContextIndependence(
        coverage=float(often.double().mean()),
        layers={name: _explained(own) for name, own in found.items()},
    )


def _explained(found: Information) -> LayerIndependence:
    whole, chance = found.expert_entropy, found.null_bits
    return LayerIndependence(
        share=found.bits / whole if whole > 0 else None,
        adjusted=(found.bits - chance) / (whole - chance) if whole - chance > _ROUNDING else None,
        information=found,
    )
