"""The first pass: the model on every text, each routing counted while it is there, then dropped.

Letters: N texts, A experts of a layer, B experts of the next one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor

from moeadapt.errors import UnsupportedError
from moeadapt.report.arms import text_losses
from moeadapt.report.counts import LayerCounts, slots_of
from moeadapt.report.texts import TextBatch, TokenizedText
from moeadapt.routing import Routing
from moeadapt.tuner.inspect import collect_routing
from moeadapt.tuner.probe import call

SHOWN_TEXTS = 48
"""Coloured texts of a report at most; they are most of its bytes."""

SHOWN_TOKENS = 128
"""Tokens of a coloured text that are shown, from its start."""

Slots = tuple[list[list[int]], list[list[float]]]
"""Experts of each token of a text in one layer, and their weights."""


@dataclass(kw_only=True)
class Watched:
    """What the first pass saw.

    Attributes:
        layers: sums of each router, in the order they ran.
        flows: tokens between the main experts of consecutive routers.
        losses: summed loss of each text.
        shown: index of each text to be coloured -> its experts and weights, layer by layer.
    """

    losses: Float[Tensor, " N"]
    shown: dict[int, list[Slots]]
    layers: list[LayerCounts] = field(default_factory=list)
    flows: list[Float[Tensor, "A B"]] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Paths of the layers."""
        return [layer.name for layer in self.layers]


def watch(
    model: PeftModel,
    adapter: str,
    texts: Sequence[TokenizedText],
    batches: Sequence[TextBatch],
    shown: Sequence[int],
) -> Watched:
    """Run the model once on every text.

    Args:
        model: in eval mode, without gradients.
        adapter: the active mixture.
        texts: all of them.
        batches: of all of them.
        shown: indices of those to be coloured.

    Raises:
        UnsupportedError: the model is no language model, or its routings cannot be watched.
    """
    found = Watched(
        losses=torch.zeros(len(texts), dtype=torch.float64), shown={i: [] for i in shown}
    )
    for batch in batches:
        with collect_routing(model) as routings:
            logits = call(model, batch.inputs)
        if logits.dim() != 3:  # noqa: PLR2004
            raise UnsupportedError("a report measures the loss of causal language models only")
        values = text_losses(logits, batch)
        found.losses[batch.texts] = torch.tensor(values, dtype=torch.float64)
        del logits
        tokens = batch.inputs.labels.numel()
        if not routings or any(
            len(own) != 1 or len(own[0].weights) != tokens for own in routings.values()
        ):
            raise UnsupportedError(
                f"the routings of adapter {adapter!r} cannot be watched; turn the adapter on, have "
                "one adapter active, and give a model that is not compiled"
            )
        _count(found, {name: own[0] for name, own in routings.items()}, batch, len(texts))
    return found


def _count(
    found: Watched, routings: Mapping[str, Routing], batch: TextBatch, num_texts: int
) -> None:
    if not found.layers:
        found.layers = [LayerCounts(n, r.num_experts, num_texts) for n, r in routings.items()]
        sizes = [layer.num_experts for layer in found.layers]
        found.flows = [torch.zeros(a, b, dtype=torch.float64) for a, b in pairwise(sizes)]
    real, rows = batch.real()
    before: Tensor | None = None
    for i, layer in enumerate(found.layers):
        routing = routings[layer.name]
        device = routing.weights.device
        main = layer.add(routing, real.to(device), rows.to(device), batch.texts).cpu()
        if before is not None:
            found.flows[i - 1] += (before.T @ main).double()
        before = main
        width = batch.inputs.labels.shape[1]
        for row, (text, length) in enumerate(zip(batch.texts, batch.lengths, strict=True)):
            if text in found.shown:
                first = row * width
                own = slice(first, first + min(length, SHOWN_TOKENS))
                found.shown[text].append(slots_of(routing, own))


def shown_texts(texts: Sequence[TokenizedText], shown: int) -> list[int]:
    """Return the first `shown` texts of each domain, of the first domains if there are many."""
    own: dict[int, list[int]] = {}
    for i, text in enumerate(texts):
        own.setdefault(text.domain, []).append(i)
    return [i for every in own.values() for i in every[:shown]][:SHOWN_TEXTS]
