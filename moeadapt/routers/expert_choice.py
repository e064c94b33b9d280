"""Expert choice: each expert takes its best tokens of a sequence, so the load is always balanced.

Letters: T tokens, D width, E experts.

Source: Zhou et al. 2022, https://arxiv.org/abs/2202.09368, eq. 1-2, within each sequence instead of
over the batch, so that rows do not influence each other. Which tokens an expert takes depends on
later ones: the router is for training and for encoders, and refuses to generate.
"""

from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from moeadapt.errors import ConfigError
from moeadapt.routers.linear import LinearRouter, LinearRouterConfig
from moeadapt.routing import Routing, TokenContext


class ExpertChoiceConfig(LinearRouterConfig):
    """Each expert takes `k * tokens / experts` tokens of each sequence, rounded up.

    Attributes:
        k: experts per token on average, > 0, at most the number of experts.
        per: only `token`; an expert has nothing to choose from one decision per sequence.
    """

    k: Annotated[float, Field(gt=0.0)] = 2.0
    per: Literal["token"] = "token"

    def check(self, num_experts: int) -> None:
        """See `RouterConfig.check`."""
        if self.k > num_experts:
            raise ConfigError(
                f"router 'expert_choice': k={self.k} is larger than num_experts={num_experts}"
            )

    def build(self, dim: int, num_experts: int) -> "ExpertChoiceRouter":
        """See `RouterConfig.build`."""
        self.check(num_experts)
        return ExpertChoiceRouter(self, dim, num_experts, max_active=num_experts, sums_to_one=False)


class ExpertChoiceRouter(LinearRouter):
    """Softmax over experts; per sequence and expert, keep the most probable tokens."""

    config: ExpertChoiceConfig
    causal: ClassVar = False
    needs: ClassVar = frozenset({"sequences"})

    def forward(self, hidden: Float[Tensor, "T D"], tokens: TokenContext) -> Routing:
        """See `Router.forward`."""
        logits_TE = self.logits(hidden)
        probs_TE = logits_TE.softmax(-1)
        chosen_TE = self._choose(probs_TE.detach(), tokens)
        return self.routing(tokens, logits=logits_TE, probs=probs_TE, weights=probs_TE * chosen_TE)

    def _choose(self, probs: Float[Tensor, "T E"], tokens: TokenContext) -> Bool[Tensor, "T E"]:
        """Mark the tokens among the best of their sequence; nothing waits for the device."""
        assert tokens.sequences is not None
        sequences_T = tokens.sequences
        real_T = torch.ones_like(sequences_T) if tokens.mask is None else tokens.mask.long()
        scores_TE = torch.where(real_T.bool().unsqueeze(-1), probs, -1.0)
        size_T = torch.zeros_like(sequences_T).index_add(0, sequences_T, real_T)
        room_T = (size_T * self.config.k / self.num_experts).ceil()
        # Sorted by score, then stably by sequence: each sequence is a run, its best token first.
        by_score_TE = scores_TE.argsort(dim=0, descending=True, stable=True)
        run_TE = sequences_T[by_score_TE].argsort(dim=0, stable=True)
        order_TE = by_score_TE.gather(0, run_TE)
        length_T = torch.zeros_like(sequences_T).index_add(
            0, sequences_T, torch.ones_like(sequences_T)
        )
        start_T = length_T.cumsum(0) - length_T
        place_T = torch.arange(len(sequences_T), device=probs.device)
        rank_TE = place_T.unsqueeze(-1) - start_T[sequences_T[order_TE]]
        fits_TE = rank_TE < room_T[sequences_T[order_TE]]
        chosen_TE = torch.zeros_like(fits_TE).scatter(0, order_TE, fits_TE)
        return chosen_TE & real_T.bool().unsqueeze(-1)
