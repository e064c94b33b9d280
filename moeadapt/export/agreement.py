"""Whether a written checkpoint chooses the experts that the adapter chose, layer by layer.

Letters: T tokens of a text, A of all, D hidden width, E experts, K experts per token.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moeadapt.export.mixture import Mixture

Inputs = dict[int, list[Tensor]]
"""Layer -> what was read, [T, D] for each text."""


@contextmanager
def watched(modules: Mapping[int, nn.Module]) -> Iterator[Inputs]:
    """Yield what each layer's module read, text by text, while the context is open."""
    seen: Inputs = {layer: [] for layer in modules}

    def keep(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[layer].append(args[0].detach().double().flatten(0, -2).cpu())

        return hook

    handles = [m.register_forward_pre_hook(keep(layer)) for layer, m in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def stock_gates(model: nn.Module, layers: Sequence[int], rows: int) -> dict[int, nn.Module]:
    """Return the module that holds each layer's gate of `rows` rows, in a stock model."""
    found = {}
    for layer in layers:
        block = model.get_submodule(f"model.layers.{layer}")
        for name, parameter in block.named_parameters():
            path = name.rpartition(".")[0]
            if ("gate" in path or "router" in path) and parameter.shape[:1] == (rows,):
                found[layer] = block.get_submodule(path)
                break
    return found


def chosen(mixture: Mixture, layer: int, inputs: Sequence[Tensor]) -> Float[Tensor, "A E"]:
    """Mark the experts that the router of `layer` chooses for what it read."""
    scores = torch.cat(list(inputs)) @ mixture.gate(layer).double().T
    bias = mixture.selection_bias(layer)
    if bias is not None:
        weights = scores.sigmoid() if mixture.rule.scoring == "sigmoid" else scores.softmax(-1)
        scores = weights + bias
    best = scores.topk(mixture.rule.top_k, dim=-1).indices
    return torch.zeros_like(scores).scatter(-1, best, 1.0)


def agreement(mixture: Mixture, ours: Inputs, theirs: Inputs) -> tuple[float, ...]:
    """Return per layer the share of chosen experts in common."""
    shares = []
    for layer in mixture.moe_layers:
        a, b = (chosen(mixture, layer, seen[layer]) for seen in (ours, theirs))
        shares.append(float((a * b).sum() / a.sum()))
    return tuple(shares)
