"""What one router did, as running sums over the real tokens of all texts.

Letters: T real tokens of a batch, W experts and null experts, E experts, N texts, B texts of a
batch.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moeadapt.routing import Routing, select_top_k

SHOWN_SLOTS = 8
"""Experts of a token that a coloured text lists at most, the largest weights."""

WEIGHT_DIGITS = 4
"""Digits after the point of the weights in a coloured text."""


class LayerCounts:
    """Sums of one router; null experts are left out of all but the probabilities.

    Attributes:
        name: path of the layer or block.
        num_experts: E.
        used: how many tokens of each text use each expert.
        main: how many tokens of each text have each expert as their main one: that of the largest
            weight, the lowest of equal ones. A token that uses none has none.
        idle: how many tokens of each text use no expert.
        together: tokens that use both experts.
        tokens: real tokens.
    """

    def __init__(self, name: str, num_experts: int, num_texts: int) -> None:
        """Start at zero."""
        self.name = name
        self.num_experts = num_experts
        # Counts of one text: float32 is exact far beyond any text's length.
        self.used = torch.zeros(num_texts, num_experts)
        self.main = torch.zeros(num_texts, num_experts)
        self.idle = torch.zeros(num_texts, 1)
        self.together = torch.zeros(num_experts, num_experts, dtype=torch.float64)
        self.tokens = 0
        self._probs = torch.zeros(num_experts, dtype=torch.float64)
        self._nats = 0.0

    def add(
        self, routing: Routing, real: Int[Tensor, " T"], rows: Int[Tensor, " T"], texts: list[int]
    ) -> Float[Tensor, "T E"]:
        """Count one batch.

        Args:
            routing: of all tokens of the batch.
            real: positions of its real tokens.
            rows: the row that each of them is in.
            texts: the text that each row is.

        Returns:
            1 at each real token's main expert, else 0.
        """
        weights_TE = routing.expert_weights[real]
        probs_TW = routing.probs[real]
        used_TE = (weights_TE != 0).float()
        main_TE = main_experts(weights_TE)
        self._add_rows(self.used, used_TE, rows, texts)
        self._add_rows(self.main, main_TE, rows, texts)
        self._add_rows(self.idle, 1 - main_TE.sum(-1, keepdim=True), rows, texts)
        # To the CPU first: not every accelerator has doubles.
        self.together += (used_TE.T @ used_TE).cpu().double()
        self.tokens += len(real)
        self._probs += probs_TW[:, : self.num_experts].sum(0).cpu().double()
        self._nats += float(torch.special.entr(probs_TW).sum())
        return main_TE

    def _add_rows(
        self,
        total: Float[Tensor, "N E"],
        values: Float[Tensor, "T E"],
        rows: Int[Tensor, " T"],
        texts: list[int],
    ) -> None:
        sums_BE = values.new_zeros(len(texts), values.shape[1]).index_add_(0, rows, values)
        total[texts] += sums_BE.cpu()

    @property
    def load(self) -> Float[Tensor, " E"]:
        """Share of the used slots of each expert; sums to one, or is 0 where none was used."""
        used_E = self.used.double().sum(0)
        return used_E / used_E.sum().clamp(min=1)

    @property
    def importance(self) -> Float[Tensor, " E"]:
        """Mean probability of each expert; sums to one where there are no null experts."""
        return self._probs / max(self.tokens, 1)

    @property
    def active(self) -> float:
        """Experts that a token uses, mean."""
        return float(self.used.double().sum()) / max(self.tokens, 1)

    @property
    def entropy(self) -> float:
        """Entropy of a token's probabilities, null experts included, mean, in bits."""
        return self._nats / max(self.tokens, 1) / math.log(2)

    @property
    def coactivation(self) -> Float[Tensor, "E E"]:
        """Share of tokens that use both experts; on the diagonal: that use the expert."""
        return self.together / max(self.tokens, 1)


def main_experts(weights: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
    """Return 1 at the largest weight of each token, the first of equal ones; 0 elsewhere.

    A token without any weight is 0 everywhere.
    """
    largest_TE = select_top_k(weights, 1)
    return (largest_TE & (weights != 0).any(-1, keepdim=True)).float()


def slots_of(routing: Routing, tokens: slice) -> tuple[list[list[int]], list[list[float]]]:
    """Return the experts that some tokens use and their weights, the largest weight first.

    At most `SHOWN_SLOTS` of them.

    Args:
        routing: of a batch.
        tokens: which tokens of it.
    """
    weights_TE = routing.expert_weights[tokens].cpu().double()
    kept = min(SHOWN_SLOTS, weights_TE.shape[1])
    weights, experts = torch.sort(weights_TE, dim=-1, descending=True, stable=True)
    found_e, found_w = [], []
    for own_w, own_e in zip(weights.tolist(), experts.tolist(), strict=True):
        used = [(e, w) for e, w in zip(own_e, own_w, strict=True) if w != 0][:kept]
        found_e.append([e for e, _ in used])
        found_w.append([round(w, WEIGHT_DIGITS) for _, w in used])
    return found_e, found_w
