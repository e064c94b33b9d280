"""What the routers do with every real token, layer by layer.

Weights are reduced batch by batch, so that memory does not grow with tokens times experts.

Letters: N real tokens of all batches, B those of one batch, E experts of a layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moeadapt.errors import UnsupportedError
from moeadapt.interpret.losses import real_tokens
from moeadapt.routing import Routing
from moeadapt.tuner.inspect import collect_routing
from moeadapt.tuner.probe import Batch, call, evaluating

Keep = Callable[[str, Float[Tensor, "B E"], Int[Tensor, " B"]], Any]
"""Makes of a layer's name, its weights in a batch and the token ids what is kept of them."""


@dataclass(frozen=True, kw_only=True)
class Observed:
    """Real tokens in the order of the data.

    Attributes:
        token_ids: vocabulary ids.
        positions: place in the text, counted from 0, padding left out.
        texts: number of the text, over all batches.
        kept: layer -> what was kept of each batch.
        sizes: real tokens of each batch.
    """

    token_ids: Int[Tensor, " N"]
    positions: Int[Tensor, " N"]
    texts: Int[Tensor, " N"]
    kept: dict[str, list[Any]]
    sizes: tuple[int, ...]

    def main_experts(self) -> dict[str, Int[Tensor, " N"]]:
        """Return layer -> main expert of each token, if it is what was kept."""
        return {layer: torch.cat(parts) for layer, parts in self.kept.items()}


def keep_main(_: str, weights: Float[Tensor, "B E"], __: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    """Keep the main expert of each token."""
    return main_expert(weights)


def observe(
    model: nn.Module, batches: Sequence[Batch], layers: Sequence[str], keep: Keep = keep_main
) -> Observed:
    """Run the model in eval mode without gradients and keep something of what it routes.

    Args:
        model: the model.
        batches: what to run it on.
        layers: which layers or blocks.
        keep: what is kept; null experts are left out of the weights it is given.

    Raises:
        UnsupportedError: a layer routes something else than the tokens, or not exactly once.
    """
    ids, positions, texts = [], [], []
    kept: dict[str, list[Any]] = {layer: [] for layer in layers}
    seen = 0
    for batch in batches:
        real = real_tokens(batch).cpu()
        rows, _ = torch.nonzero(real, as_tuple=True)
        ids.append(batch.inputs["input_ids"].cpu()[real])
        positions.append((real.long().cumsum(1) - 1)[real])
        texts.append(rows + seen)
        seen += len(real)
        with evaluating(model), collect_routing(model) as routings:
            call(model, batch)
        for layer in layers:
            routing = routing_of(routings, layer, real.numel())
            weights = routing.expert_weights.cpu()[real.reshape(-1)]
            kept[layer].append(keep(layer, weights, ids[-1]))
    return Observed(
        token_ids=torch.cat(ids),
        positions=torch.cat(positions),
        texts=torch.cat(texts),
        kept=kept,
        sizes=tuple(len(own) for own in ids),
    )


def routing_of(routings: dict[str, list[Routing]], layer: str, tokens: int) -> Routing:
    """Return the one routing of `layer` in one forward over `tokens` tokens.

    Raises:
        UnsupportedError: there is none, there are several, or it is about something else.
    """
    found = routings.get(layer, [])
    if len(found) != 1 or len(found[0].weights) != tokens:
        what = [len(routing.weights) for routing in found] or "nothing"
        raise UnsupportedError(
            f"{layer} routed {what} where the batch has {tokens} tokens, so its routing cannot be "
            "told token by token; name other layers with layers="
        )
    return found[0]


def main_expert(weights: Float[Tensor, "N E"]) -> Int[Tensor, " N"]:
    """Return the expert with the largest weight; E where a token uses none."""
    used: Bool[Tensor, " N"] = (weights != 0).any(-1)
    return torch.where(used, weights.argmax(-1), weights.shape[1])
