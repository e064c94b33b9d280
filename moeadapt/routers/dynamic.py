"""Top-any routing: each expert has a threshold of its own, and training adds and removes experts.

Letters: T tokens, D width, E experts.

Source: Guo et al. 2024 (DynMoE), https://arxiv.org/abs/2405.14297, eq. 4-6 (top-any gating) and
section 3.2 (adaptive process). Experts are added and removed within a pool of `num_experts`: a
removed one is switched off, an added one is a switched-off one whose embedding becomes the mean
direction of the tokens that nobody took. Tensors keep their shapes, so optimizers and files do too.
"""

from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from moeadapt.errors import ConfigError
from moeadapt.routers.linear import LinearRouter, LinearRouterConfig
from moeadapt.routing import Routing, TokenContext, select_top_k


class DynamicConfig(LinearRouterConfig):
    """Each token uses every expert whose similarity passes that expert's learned threshold.

    In training a token may use none, outside it uses its nearest one at least.

    Attributes:
        start: experts switched on at the start, >= 1; None: all.
        bias: always false; a threshold per expert takes its place.
        every: optimizer steps between two changes of the set of experts, >= 0; 0: never.
    """

    start: Annotated[int, Field(ge=1)] | None = None
    every: Annotated[int, Field(ge=0)] = 0
    bias: Literal[False] = False

    def check(self, num_experts: int) -> None:
        """See `RouterConfig.check`."""
        if self.every and self.freeze:
            raise ConfigError(
                f"router 'dynamic': every={self.every} changes the gate, and freeze=True forbids "
                "it; leave one of them out"
            )
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
    adaptive = True
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
        self.acts_after_step = bool(config.every)
        self.record_size = dim if config.every else 0

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
        if not self.training:
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

    def record(self, routing: Routing, hidden: Float[Tensor, "T D"]) -> Float[Tensor, " R"]:
        """See `Router.record`: the sum of the directions of tokens that used no expert."""
        if not self.config.every:
            return super().record(routing, hidden)
        with torch.no_grad():
            alone_T = ~(routing.weights != 0).any(-1)
            if routing.token_mask is not None:
                alone_T = alone_T & routing.token_mask
            x = F.normalize(self.features(hidden), dim=-1)
            return torch.where(alone_T.unsqueeze(-1), x, torch.zeros_like(x)).sum(0).float()

    @torch.no_grad()
    def after_step(
        self,
        tokens: Float[Tensor, ""],
        uses: Float[Tensor, " E"],
        record: Float[Tensor, " R"],
    ) -> None:
        """See `Router.after_step`: every so many steps, drop idle experts and add one for the rest.

        The most used expert stays whatever happens. Nothing here waits for the device.
        """
        if not self.config.every:
            return
        counts = (tokens > 0).to(self.seen_steps.dtype)
        self.seen_steps += counts
        self.seen_uses += uses.to(self.seen_uses)
        self.unrouted += record.to(self.unrouted)
        due = (self.seen_steps >= self.config.every) & (counts > 0)
        index_E = torch.arange(self.num_experts, device=self.alive.device)
        most = self.seen_uses.masked_fill(~self.alive, -1.0).argmax()
        kept_E = self.alive & ((self.seen_uses > 0) | (index_E == most))
        new_E = (index_E == (~kept_E).to(torch.uint8).argmax()) & ~kept_E & self.unrouted.any()
        new_E = new_E & due
        self.alive.copy_(torch.where(due, kept_E | new_E, self.alive))
        self.threshold.copy_(torch.where(new_E, torch.zeros_like(self.threshold), self.threshold))
        towards = (
            F.normalize(self.unrouted, dim=-1).to(self.weight) * self.weight.norm(dim=-1).mean()
        )
        self.weight.copy_(torch.where(new_E.unsqueeze(-1), towards, self.weight))
        for seen in (self.seen_steps, self.seen_uses, self.unrouted):
            seen.mul_((~due).to(seen.dtype))
