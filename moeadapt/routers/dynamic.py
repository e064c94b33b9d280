"""Top-any routing: each expert has a threshold of its own, and training adds and removes experts.

Letters: T tokens, D width, E experts.

Source: Guo et al. 2024 (DynMoE), https://arxiv.org/abs/2405.14297, eq. 4-6 (top-any gating) and
section 3.2 (adaptive process). Experts are added and removed within a pool of `num_experts`: a
removed one is switched off, an added one is a switched-off one whose embedding becomes the mean
direction of the tokens that nobody took. Tensors keep their shapes, so optimizers and files do too.
"""

from collections.abc import Callable
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from moeadapt.errors import ConfigError
from moeadapt.routers.base import LinearRouter, LinearRouterConfig
from moeadapt.routing import Routing, TokenContext, select_top_k


class DynamicConfig(LinearRouterConfig):
    """Each token uses every expert whose similarity passes that expert's learned threshold.

    In training a token may use none, outside it uses its nearest one at least.

    Attributes:
        start: experts switched on at the start, >= 1; None: all.
        every: optimizer steps between two changes of the set of experts, >= 0; 0: never.
    """

    start: Annotated[int, Field(ge=1)] | None = None
    every: Annotated[int, Field(ge=0)] = 0

    def check(self, num_experts: int) -> None:
        """See `RouterConfig.check`."""
        if self.start is not None and self.start > num_experts:
            raise ConfigError(
                f"router 'dynamic': start={self.start} is larger than num_experts={num_experts}"
            )

    def build(self, dim: int, num_experts: int) -> "DynamicRouter":
        """See `RouterConfig.build`."""
        self.check(num_experts)
        return DynamicRouter(self, dim, num_experts)


class DynamicRouter(LinearRouter):
    """sigmoid(cosine) > sigmoid(threshold), straight-through; the chosen share equally.

    Attributes:
        alive: which experts are switched on.
        seen_steps: optimizer steps since the set last changed.
        seen_uses: uses of each expert since then.
        unrouted: sum of the directions of tokens that used no expert since then.
    """

    config: DynamicConfig
    acts_after_step = True
    alive: Tensor
    seen_steps: Tensor
    seen_uses: Tensor
    unrouted: Tensor

    def __init__(self, config: DynamicConfig, dim: int, num_experts: int) -> None:
        """Make the embeddings (the gate), the thresholds and the record."""
        super().__init__(config, dim, num_experts, max_active=num_experts, sums_to_one=False)
        self.threshold = nn.Parameter(torch.zeros(num_experts))
        start = config.start or num_experts
        self.register_buffer("alive", torch.arange(num_experts) < start)
        self.register_buffer("seen_steps", torch.zeros(()))
        self.register_buffer("seen_uses", torch.zeros(num_experts))
        self.register_buffer("unrouted", torch.zeros(dim))

    def logits(self, hidden: Float[Tensor, "T D"]) -> Float[Tensor, "T E"]:
        """Cosines of the hidden states with the expert embeddings."""
        with torch.autocast(hidden.device.type, enabled=False):
            x = F.normalize(self.features(hidden), dim=-1)
            return self.finish(F.linear(x, F.normalize(self.weight.to(x.dtype), dim=-1)))

    def forward(self, hidden: Float[Tensor, "T D"], tokens: TokenContext) -> Routing:
        """See `Router.forward`."""
        logits_TE = self.logits(hidden)
        scores_TE = logits_TE.sigmoid()
        margin_TE = scores_TE - self.threshold.to(scores_TE.dtype).sigmoid()
        chosen_TE = (margin_TE.detach() > 0) & self.alive
        if self.training:
            self._record(hidden, chosen_TE, tokens)
        else:
            ranked_TE = scores_TE.masked_fill(~self.alive, -torch.inf)
            none_T1 = ~chosen_TE.any(-1, keepdim=True)
            chosen_TE = chosen_TE | (none_T1 & select_top_k(ranked_TE.detach(), 1))
        hard_TE = chosen_TE.to(scores_TE.dtype)
        count_T1 = hard_TE.sum(-1, keepdim=True).clamp(min=1)
        # Straight-through: the step's gradient is that of the margin, for the experts chosen.
        through_TE = hard_TE * (1 + margin_TE - margin_TE.detach())
        return self.routing(
            tokens,
            logits=logits_TE,
            probs=F.logsigmoid(logits_TE).masked_fill(~self.alive, -torch.inf).softmax(-1),
            weights=through_TE / count_T1,
        )

    def _record(self, hidden: Tensor, chosen: Tensor, tokens: TokenContext) -> None:
        with torch.no_grad():
            alone_T = ~chosen.any(-1)
            if tokens.mask is not None:
                alone_T = alone_T & tokens.mask
            x = F.normalize(self.features(hidden), dim=-1).to(self.unrouted.dtype)
            x = torch.where(alone_T.unsqueeze(-1), x, torch.zeros_like(x))
            self.unrouted.add_(x.sum(0))

    @torch.no_grad()
    def after_step(self, uses: Float[Tensor, " E"], reduce: Callable[[Tensor], Tensor]) -> None:
        """See `Router.after_step`: every so many steps, drop idle experts and add one for the rest.

        One expert stays whatever happens.
        """
        if not self.config.every:
            return
        self.seen_steps += 1
        self.seen_uses += uses.to(self.seen_uses)
        if self.seen_steps < self.config.every:
            return
        unrouted = reduce(self.unrouted)
        self.alive &= (self.seen_uses > 0) | (self.seen_uses.argmax() == _index(self.seen_uses))
        free = (~self.alive).nonzero().flatten()
        if len(free) and unrouted.any():
            new = int(free[0])
            self.alive[new] = True
            self.threshold[new] = 0.0
            self.weight[new] = F.normalize(unrouted, dim=-1) * self.weight.norm(dim=-1).mean()
        for record in (self.seen_steps, self.seen_uses, self.unrouted):
            record.zero_()


def _index(values: Tensor) -> Tensor:
    return torch.arange(len(values), device=values.device)
