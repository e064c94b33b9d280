"""The routing weights of every real token, layer by layer.

Letters: N real tokens of all batches, E experts of a layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moeadapt.errors import UnsupportedError
from moeadapt.interpret.losses import real_tokens
from moeadapt.routing import Routing
from moeadapt.tuner.inspect import collect_routing
from moeadapt.tuner.probe import Batch, call, evaluating


@dataclass(frozen=True, kw_only=True)
class Observed:
    """Real tokens in the order of the data.

    Attributes:
        token_ids: vocabulary ids.
        positions: place in the text, counted from 0, padding left out.
        texts: number of the text, over all batches.
        weights: layer -> routing weights, null experts left out.
    """

    token_ids: Int[Tensor, " N"]
    positions: Int[Tensor, " N"]
    texts: Int[Tensor, " N"]
    weights: dict[str, Float[Tensor, "N E"]]


def observe(model: nn.Module, batches: Sequence[Batch], layers: Sequence[str]) -> Observed:
    """Run the model in eval mode without gradients and keep what it routes.

    Raises:
        UnsupportedError: a layer routes something else than the tokens, or not exactly once.
    """
    ids, positions, texts = [], [], []
    weights: dict[str, list[Tensor]] = {layer: [] for layer in layers}
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
            weights[layer].append(routing.expert_weights.cpu()[real.reshape(-1)])
    return Observed(
        token_ids=torch.cat(ids),
        positions=torch.cat(positions),
        texts=torch.cat(texts),
        weights={layer: torch.cat(parts) for layer, parts in weights.items()},
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
