"""The mixtures written out: one token, one expert, plain matrices. Slow, and obviously right.

Letters: T tokens, D in, O out, E experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from moeadapt.tuner import MoeLoraLinear

Weigh = Callable[[Tensor], list[tuple[int, Tensor]]]
"""One token's probabilities [E] -> its experts and their weights."""


def top_k(k: int) -> Weigh:
    """Return the `k` most probable experts, their probabilities divided by their sum."""

    def weigh(probs: Tensor) -> list[tuple[int, Tensor]]:
        best = sorted(range(len(probs)), key=lambda e: -probs[e].item())[:k]
        return [(e, probs[e] / sum(probs[b] for b in best)) for e in best]

    return weigh


def top_1(probs: Tensor) -> list[tuple[int, Tensor]]:
    """Return the most probable expert with its probability as weight (Switch)."""
    best = int(probs.argmax())
    return [(best, probs[best])]


def everyone(probs: Tensor) -> list[tuple[int, Tensor]]:
    """Return all experts with equal weights."""
    return [(e, torch.ones_like(probs[0]) / len(probs)) for e in range(len(probs))]


@dataclass(frozen=True)
class Expert:
    """The experts of one target linear, read from its tensors.

    Attributes:
        layer: the layer under test; only its tensors are used.
        rank: rank of one expert.
        scale: alpha / rank.
        shared: ids of the always-on experts.
    """

    layer: MoeLoraLinear
    rank: int = 4
    scale: float = 2.0
    shared: Sequence[int] = ()

    def base(self, x: Tensor) -> Tensor:
        """Apply the base linear to one token."""
        linear = self.layer.base_layer
        weight = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
        y = weight @ x
        return y if linear.bias is None else y + linear.bias

    def delta(self, x: Tensor, expert: int) -> Tensor:
        """Return what one expert adds for one token."""
        a = self.layer.moeadapt_lora_A["default"].weight
        b = self.layer.moeadapt_lora_B["default"].weight
        own = slice(expert * self.rank, (expert + 1) * self.rank)
        return self.scale * (b[:, own] @ (a[own] @ x))

    def always(self, x: Tensor) -> Tensor:
        """Return the base output plus the shared experts'."""
        return self.base(x) + sum(self.delta(x, e) for e in self.shared)

    def whole(self, x: Tensor, expert: int | None) -> Tensor:
        """Return the linear of one expert; None: without a routed expert."""
        return self.always(x) if expert is None else self.always(x) + self.delta(x, expert)


def routes(gate: nn.Module | None, num_experts: int, x: Tensor, weigh: Weigh) -> list:
    """Route one token with the gate's matrix; None: all logits are 0."""
    scores = x.new_zeros(num_experts) if gate is None else gate.weight @ x
    return weigh(scores.softmax(-1))


def linear_mixture(expert: Expert, gate, num_experts, x: Tensor, routed: Tensor, weigh: Weigh):
    """`W x + shared + sum_e w_e(routed) delta_e(x)`, token by token."""
    rows = []
    for token, chooser in zip(x.flatten(0, -2), routed.flatten(0, -2), strict=True):
        chosen = routes(gate, num_experts, chooser, weigh)
        rows.append(expert.always(token) + sum(w * expert.delta(token, e) for e, w in chosen))
    return torch.stack(rows).view(*x.shape[:-1], -1)


def gated_ffn(act: Callable[[Tensor], Tensor], gate: Expert, up: Expert, down: Expert):
    """Return Llama's FFN as a function of a token and an expert."""

    def ffn(x: Tensor, e: int | None) -> Tensor:
        return down.whole(act(gate.whole(x, e)) * up.whole(x, e), e)

    return ffn


def plain_ffn(act: Callable[[Tensor], Tensor], first: Expert, second: Expert):
    """Return GPT-2's FFN as a function of a token and an expert."""

    def ffn(x: Tensor, e: int | None) -> Tensor:
        return second.whole(act(first.whole(x, e)), e)

    return ffn


def ffn_mixture(ffn, gate, num_experts: int, x: Tensor, weigh: Weigh) -> Tensor:
    """`sum_e w_e FFN_e(x)`, and the FFN without experts takes what the weights leave of 1.

    With weights that sum to one: MixLoRA (Li et al. 2024, https://arxiv.org/abs/2404.15159, eq. 4).
    """
    rows = []
    for token in x.flatten(0, -2):
        chosen = routes(gate, num_experts, token, weigh)
        rest = 1 - sum(w for _, w in chosen)
        rows.append(sum(w * ffn(token, e) for e, w in chosen) + rest * ffn(token, None))
    return torch.stack(rows).view(*x.shape[:-1], -1)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "llama": F.silu,
    "qwen3": F.silu,
    "mistral": F.silu,
    "gemma": lambda x: F.gelu(x, approximate="tanh"),
    "gpt2": lambda x: F.gelu(x, approximate="tanh"),
    "opt": F.relu,
}
