"""Whether a written checkpoint chooses the experts that the adapter chose, layer by layer.

Letters: T tokens of a text, A of all, W experts on disk, K experts per token.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from moeadapt.errors import ExportError
from moeadapt.export.refusals import layer_of
from moeadapt.routing import Routing

Choices = dict[int, Bool[Tensor, "A W"]]
"""Layer -> the experts that each token uses."""


@contextmanager
def watched(model: nn.Module, layers: Sequence[int], width: int) -> Iterator[Choices]:
    """Yield what a stock model's own routers choose; filled when the context closes.

    Every mixture class of transformers calls its experts with the token's hidden state, the chosen
    experts and their weights, whatever computed those.

    Args:
        model: a stock mixture.
        layers: its layers with a mixture.
        width: W.

    Raises:
        ExportError: a layer has no module of experts.
    """
    seen: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    choices: Choices = {}

    def keep(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            index = args[1].detach().cpu().flatten(0, -2)
            chosen = torch.zeros(len(index), width, dtype=torch.bool)
            seen[layer].append(chosen.scatter(1, index, value=True))

        return hook

    handles = [_experts(model, i).register_forward_pre_hook(keep(i)) for i in layers]
    try:
        yield choices
        choices.update({layer: torch.cat(found) for layer, found in seen.items()})
    finally:
        for handle in handles:
            handle.remove()


def _experts(model: nn.Module, layer: int) -> nn.Module:
    block = model.get_submodule(f"model.layers.{layer}")
    for name, module in block.named_modules():
        if name.rpartition(".")[2] == "experts":
            return module
    raise ExportError(f"layer {layer} of {type(model).__name__} has no module of experts")


def choices_of(routings: Mapping[str, Sequence[Routing]], width: int) -> Choices:
    """Return what the routers of an adapter chose: experts with a weight above 0.

    Args:
        routings: what `collect_routing` found.
        width: W; null experts that are not written come after them.
    """
    return {
        layer_of(path): torch.cat([r.weights[:, :width].cpu() > 0 for r in found])
        for path, found in routings.items()
    }


def agreement(ours: Choices, theirs: Choices) -> tuple[float, ...]:
    """Return per layer the share of the adapter's chosen experts that the checkpoint chose too."""
    return tuple(
        float((ours[layer] & theirs[layer]).sum() / ours[layer].sum()) for layer in sorted(ours)
    )
