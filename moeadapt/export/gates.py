"""First rows of the routers of an upcycled model.

Letters: E experts, D hidden width, N inputs, T tokens of one text.

Source: `hidden` follows the gate initialisation of mergekit's mixtral mode (a row is the mean
hidden state of prompts of its expert). We differ: the mean is of what the router really reads, the
FFN's input after its norm.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from moeadapt.errors import ConfigError
from moeadapt.tuner.init import spherical_kmeans
from moeadapt.tuner.probe import evaluating

GateInit = Literal["random", "hidden", "kmeans"]
GATE_INITS = ("random", "hidden", "kmeans")
KMEANS_STEPS = 20
MAX_INPUTS = 8192
"""Inputs kept per layer for k-means, spread evenly over all tokens."""

Take = Callable[[int, int, Tensor], None]
"""Is given a layer, the number of tokens in earlier texts, and the layer's FFN inputs [T D]."""


def random_gates(
    layers: Sequence[int], num_experts: int, width: int, std: float, seed: int
) -> dict[int, Float[Tensor, "E D"]]:
    """Return small random rows per layer, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return {layer: std * torch.randn(num_experts, width, generator=generator) for layer in layers}


def hidden_gates(
    model: PreTrainedModel, ids: Sequence[Sequence[Tensor]]
) -> dict[int, Float[Tensor, "E D"]]:
    """Return per layer the unit direction of the mean FFN input of each expert's prompts.

    Args:
        model: the dense base; runs in eval mode on its device.
        ids: token ids of the prompts, one list per expert.

    Raises:
        ConfigError: an expert has no prompt.
    """
    lacking = [expert for expert, prompts in enumerate(ids) if not prompts]
    if lacking:
        raise ConfigError(f"gate_init='hidden': experts {lacking} have no prompts")
    rows: dict[int, list[Tensor]] = {}
    for prompts in ids:
        for layer, mean in _mean_inputs(model, prompts).items():
            rows.setdefault(layer, []).append(mean)
    return {layer: nn.functional.normalize(torch.stack(r), dim=-1) for layer, r in rows.items()}


def kmeans_gates(
    model: PreTrainedModel, ids: Sequence[Tensor], num_experts: int, seed: int
) -> dict[int, Float[Tensor, "E D"]]:
    """Return per layer the unit centres of the FFN's inputs, at most `MAX_INPUTS` of them.

    Args:
        model: the dense base; runs in eval mode on its device.
        ids: token ids of the texts.
        num_experts: centres per layer.
        seed: of the first centres.

    Raises:
        ConfigError: there are fewer tokens than experts.
    """
    tokens = sum(text.numel() for text in ids)
    if tokens < num_experts:
        raise ConfigError(
            f"gate_init='kmeans': {tokens} tokens for {num_experts} experts; give more gate_texts"
        )
    kept = _spread_inputs(model, ids, min(tokens, max(MAX_INPUTS, num_experts)))
    gates = {}
    for layer in sorted(kept):
        inputs = torch.cat(kept.pop(layer))
        generator = torch.Generator().manual_seed(seed)
        gates[layer] = spherical_kmeans(inputs, num_experts, KMEANS_STEPS, generator)
    return gates


def _mean_inputs(model: PreTrainedModel, ids: Sequence[Tensor]) -> dict[int, Float[Tensor, " D"]]:
    """Return per layer the mean FFN input over all tokens; keeps sums, no inputs."""
    sums: dict[int, Tensor] = {}

    def add(layer: int, start: int, inputs: Tensor) -> None:
        total = inputs.float().sum(0).cpu().double()
        sums[layer] = sums[layer] + total if layer in sums else total

    _read_ffns(model, ids, add)
    tokens = sum(text.numel() for text in ids)
    return {layer: (total / tokens).float() for layer, total in sums.items()}


def _spread_inputs(
    model: PreTrainedModel, ids: Sequence[Tensor], count: int
) -> dict[int, list[Float[Tensor, "_ D"]]]:
    """Return per layer `count` FFN inputs, in order and spread evenly over all tokens."""
    chosen = torch.arange(count) * sum(text.numel() for text in ids) // count
    kept: dict[int, list[Tensor]] = {}

    def keep(layer: int, start: int, inputs: Tensor) -> None:
        own = chosen[(chosen >= start) & (chosen < start + len(inputs))] - start
        kept.setdefault(layer, []).append(inputs[own.to(inputs.device)].cpu())

    _read_ffns(model, ids, keep)
    return kept


def _read_ffns(model: PreTrainedModel, ids: Sequence[Tensor], take: Take) -> None:
    """Run the dense base in eval mode, and show `take` what each layer's FFN reads."""
    start = 0

    def watch(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            take(layer, start, args[0].detach().flatten(0, -2))

        return hook

    layers = model.get_submodule("model.layers")
    handles = []
    for index, layer in enumerate(layers.children()):
        ffn = getattr(layer, "mlp", None) or layer.get_submodule("feed_forward")
        handles.append(ffn.register_forward_pre_hook(watch(index)))
    try:
        with evaluating(model):
            for text in ids:
                model(input_ids=text.reshape(1, -1).to(model.device), use_cache=False)
                start += text.numel()
    finally:
        for handle in handles:
            handle.remove()
