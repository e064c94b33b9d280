"""First rows of the routers of an upcycled model.

Letters: E experts, D hidden width, N inputs.

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

GateInit = Literal["random", "hidden", "kmeans"]
GATE_INITS = ("random", "hidden", "kmeans")
KMEANS_STEPS = 20
MAX_INPUTS = 8192
"""Inputs kept per layer for k-means."""


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
        model: the dense base.
        ids: token ids of the prompts, one list per expert.

    Raises:
        ConfigError: an expert has no prompt.
    """
    lacking = [expert for expert, prompts in enumerate(ids) if not prompts]
    if lacking:
        raise ConfigError(f"gate_init='hidden': experts {lacking} have no prompts")
    rows: dict[int, list[Tensor]] = {}
    for prompts in ids:
        for layer, inputs in ffn_inputs(model, prompts).items():
            rows.setdefault(layer, []).append(inputs.mean(0))
    return {layer: nn.functional.normalize(torch.stack(r), dim=-1) for layer, r in rows.items()}


def kmeans_gates(
    model: PreTrainedModel, ids: Sequence[Tensor], num_experts: int, seed: int
) -> dict[int, Float[Tensor, "E D"]]:
    """Return per layer the unit centres of the FFN's inputs.

    Raises:
        ConfigError: there are fewer tokens than experts.
    """
    gates = {}
    for layer, inputs in ffn_inputs(model, ids).items():
        if len(inputs) < num_experts:
            raise ConfigError(
                f"gate_init='kmeans': {len(inputs)} tokens for {num_experts} experts; give more "
                "gate_texts"
            )
        generator = torch.Generator().manual_seed(seed)
        gates[layer] = spherical_kmeans(inputs[:MAX_INPUTS], num_experts, KMEANS_STEPS, generator)
    return gates


def ffn_inputs(model: PreTrainedModel, ids: Sequence[Tensor]) -> dict[int, Float[Tensor, "N D"]]:
    """Run the dense base and return what each layer's FFN read, in float32."""
    kept: dict[int, list[Tensor]] = {}

    def keep(layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            kept.setdefault(layer, []).append(args[0].detach().float().flatten(0, -2).cpu())

        return hook

    layers = model.get_submodule("model.layers")
    handles = []
    for index, layer in enumerate(layers.children()):
        ffn = getattr(layer, "mlp", None) or layer.get_submodule("feed_forward")
        handles.append(ffn.register_forward_pre_hook(keep(index)))
    try:
        with torch.no_grad():
            for text in ids:
                model(input_ids=text.reshape(1, -1), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {layer: torch.cat(inputs) for layer, inputs in kept.items()}
