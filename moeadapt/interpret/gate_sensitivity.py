"""How much does the loss depend on the routing weights, and do small changes of input move tokens?

Letters: T tokens, E experts, N real tokens.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeadapt.errors import ConfigError
from moeadapt.interpret.losses import as_batches, logits_of, real_tokens, require_labels, token_nll
from moeadapt.interpret.observe import observe
from moeadapt.interpret.scope import choose_layers
from moeadapt.routing import Routing
from moeadapt.tuner.override import override_routing
from moeadapt.tuner.probe import Batch, evaluating


@dataclass(frozen=True, kw_only=True)
class GateSensitivity:
    """Per layer or block.

    Attributes:
        rms: layer -> expert -> root mean square over real tokens of the derivative of the texts'
            summed loss to the token's weight, in nats per unit of weight.
        mean: layer -> expert -> mean of the same; below 0: more of the expert would lower the
            loss, to first order.
        noise: standard deviation of the noise, relative to the root mean square of a token's
            embedding.
        moved: layer -> share of the real tokens whose main expert is another one, one per `noise`.
    """

    rms: dict[str, tuple[float, ...]]
    mean: dict[str, tuple[float, ...]]
    noise: tuple[float, ...]
    moved: dict[str, tuple[float, ...]]


def gate_sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    noise: Sequence[float] = (0.01, 0.1),
    *,
    layers: Sequence[str] | None = None,
    seed: int = 0,
) -> GateSensitivity:
    """Differentiate the loss to every routing weight, and route again with noisy embeddings.

    Weights of 0 have a derivative too: what a little of an expert that the token does not use
    would change. A derivative holds all that follows, in later layers and their routers, where
    choices of experts count as constant.

    Costs one forward and backward, one forward more, and one per entry of `noise`.

    Args:
        model: the model, in any wrapper.
        batches: what to measure on, see `read_batches`.
        noise: standard deviations of Gaussian noise on the embeddings, relative, at least 0; the
            same draws for each. Empty: none.
        layers: layers or blocks, named as by `collect_routing`; None: all.
        seed: of the noise.

    Raises:
        ConfigError: no mixture, or several, are active; no such layer; a negative noise; nothing
            to measure on; the model is no language model or has no input embeddings.
        UnsupportedError: a layer does not route these tokens one by one.

    Example:
        >>> gate_sensitivity(model, batches, noise=[0.05]).moved
    """
    names = list(choose_layers(model, layers))
    if any(not scale >= 0 for scale in noise):
        raise ConfigError(f"noise={list(noise)} must be at least 0, relative to the embeddings")
    data = as_batches(batches)
    require_labels(data)
    squares, sums, tokens = _derivatives(model, data, names)
    plain = observe(model, data, names).main_experts()
    moved: dict[str, list[float]] = {name: [] for name in names}
    for scale in noise:
        with _noisy_embeddings(model, scale, seed):
            noisy = observe(model, data, names).main_experts()
        for name in names:
            moved[name].append(float((noisy[name] != plain[name]).double().mean()))
    return GateSensitivity(
        rms={name: tuple((squares[name] / tokens).sqrt().tolist()) for name in names},
        mean={name: tuple((sums[name] / tokens).tolist()) for name in names},
        noise=tuple(float(scale) for scale in noise),
        moved={name: tuple(shares) for name, shares in moved.items()},
    )


def _derivatives(
    model: nn.Module, data: Sequence[Batch], names: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Return the sums of squares and of values over real tokens, and their number."""
    squares: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    tokens = 0
    for batch in data:
        real = real_tokens(batch).reshape(-1).cpu()
        tokens += int(real.sum())
        for name, slope in _slopes(model, batch, names).items():
            own = slope[real]
            squares[name] = squares.get(name, 0) + own.square().sum(0)
            sums[name] = sums.get(name, 0) + own.sum(0)
    return squares, sums, tokens


def _slopes(model: nn.Module, batch: Batch, names: Sequence[str]) -> dict[str, Tensor]:
    """Return d (summed loss) / d weights, layer -> [T, E], in float64."""
    leaves: dict[str, Tensor] = {}

    def edit(layer: str, routing: Routing) -> Tensor:
        own = routing.expert_weights
        leaves[layer] = torch.zeros_like(own, requires_grad=True)
        return own + leaves[layer]

    with evaluating(model), torch.enable_grad(), override_routing(model, edit=edit, layers=names):
        loss = token_nll(logits_of(model, batch), batch).sum()
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {
        name: (torch.zeros_like(leaf) if slope is None else slope).double().cpu()
        for (name, leaf), slope in zip(leaves.items(), found, strict=True)
    }


@contextmanager
def _noisy_embeddings(model: nn.Module, scale: float, seed: int) -> Iterator[None]:
    asked: Any = model
    embeddings = asked.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if not isinstance(embeddings, nn.Module):
        raise ConfigError(f"{type(model).__name__} has no input embeddings to add noise to")
    generator = torch.Generator().manual_seed(seed)

    def hook(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        drawn = torch.randn(output.shape, generator=generator).to(output)
        size = output.float().square().mean(-1, keepdim=True).sqrt().to(output)
        return output + scale * size * drawn

    handle = embeddings.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
