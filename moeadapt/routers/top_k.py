"""Top-k routing: each token uses its k most probable experts.

Letters: T tokens, D width, E experts, W experts and null experts.

Source: Shazeer et al. 2017, https://arxiv.org/abs/1701.06538, eq. 3-5 (softplus noise); Mixtral,
https://arxiv.org/abs/2401.04088, section 2.1 (softmax over the chosen logits = `renorm`); Switch,
https://arxiv.org/abs/2101.03961, section 2.2 (jitter); AdaMoE, Zeng et al. 2024,
https://arxiv.org/abs/2406.13233, section 3.2 (null experts: the weights of the other chosen
experts are normalised among themselves).
"""

import warnings
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from moeadapt import kernels
from moeadapt.kernels.top_k_gate import MOST_EXPERTS, top_k_gate
from moeadapt.routers.base import check_k
from moeadapt.routers.float32_linear import float32_linear
from moeadapt.routers.linear import LinearRouter, LinearRouterConfig, renormalize
from moeadapt.routing import Routing, TokenContext, select_top_k


class TopKConfig(LinearRouterConfig):
    """Each token uses its `k` most probable experts.

    Attributes:
        k: experts per token, 1 to the number of experts, null experts included.
        null_experts: further experts that change nothing, 0 to 65536: a token that chooses some of
            them uses fewer of the others, and none at all if it chooses nothing else.
        normalize: `renorm` divides the chosen probabilities by their sum, `topk_softmax` takes the
            softmax of the chosen logits (the same numbers), `none` keeps the probabilities. With
            `k=1` a renormalised weight is constantly 1 and never trains the router, so the default
            is `none` for `k=1` and `renorm` otherwise.
        noise: training only, drawn from torch's own generator so that a checkpointed forward
            redraws it: `gaussian` adds `noise_std` times a normal number to each logit, `softplus`
            scales it by a learned softplus(x W_noise) per expert (Shazeer 2017, eq. 4).
        noise_std: standard deviation of the logit noise, > 0.
        jitter: training only: the hidden state is multiplied by a uniform number in
            [1 - jitter, 1 + jitter], in [0, 1).
    """

    k_can_change: ClassVar = True

    k: Annotated[int, Field(ge=1)] = 2
    normalize: Literal["renorm", "topk_softmax", "none"] | None = None
    noise: Literal["none", "gaussian", "softplus"] = "none"
    noise_std: Annotated[float, Field(gt=0.0)] = 1.0
    jitter: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    null_experts: Annotated[int, Field(ge=0, le=65536)] = 0

    def resolved_normalize(self) -> str:
        """`normalize`, or the default for this `k`."""
        return self.normalize or ("none" if self.k == 1 else "renorm")

    def check(self, num_experts: int) -> None:
        """See `RouterConfig.check`."""
        check_k("top_k", self.k, num_experts + self.null_experts)
        if self.k == 1 and self.resolved_normalize() != "none" and not self.freeze:
            warnings.warn(
                f"router 'top_k' with k=1 and normalize={self.normalize!r} gives every token the "
                "weight 1, so the task loss never trains the router; use normalize='none'",
                stacklevel=2,
            )

    def build(self, dim: int, num_experts: int) -> "TopKRouter":
        """See `RouterConfig.build`."""
        self.check(num_experts)
        return TopKRouter(self, dim, num_experts)


class TopKRouter(LinearRouter):
    """Softmax over all experts, keep the `k` largest, lowest index first among equals."""

    config: TopKConfig
    k: int
    ranks_with_bias = True

    def __init__(self, config: TopKConfig, dim: int, num_experts: int) -> None:
        """Make the gate, and the noise gate if the noise is learned."""
        normalized = config.resolved_normalize() != "none"
        super().__init__(
            config,
            dim,
            num_experts,
            max_active=min(config.k, num_experts),
            sums_to_one=normalized and not config.null_experts,
            null_experts=config.null_experts,
        )
        self.k = config.k
        learned = config.noise == "softplus"
        self.noise_weight = nn.Parameter(torch.zeros(self.width, dim)) if learned else None

    def forward(self, hidden: Float[Tensor, "T D"], tokens: TokenContext) -> Routing:
        """See `Router.forward`."""
        if self.training and self.config.jitter:
            low, high = 1.0 - self.config.jitter, 1.0 + self.config.jitter
            hidden = hidden * torch.empty_like(hidden).uniform_(low, high)
        logits_TW = self.logits(hidden)
        if self.training and self.config.noise != "none":
            logits_TW = logits_TW + self._noise(hidden, logits_TW)
        if self._has_kernel and kernels.use("top_k_gate", logits_TW):
            renorm = self.config.resolved_normalize() != "none"
            weights_TW, probs_TW = top_k_gate(logits_TW, self.k, tokens.mask, renorm=renorm)[:2]
            return self.routing(tokens, logits=logits_TW, probs=probs_TW, weights=weights_TW)
        probs_TW = logits_TW.softmax(-1)
        # Softmax keeps the order, so without a bias the logits rank as the probabilities do.
        scores_TW = logits_TW if self.selection_bias is None else probs_TW
        chosen_TW = select_top_k(self.ranked(scores_TW), self.k)
        if self.config.resolved_normalize() == "topk_softmax":
            weights_TW = logits_TW.masked_fill(~chosen_TW, -torch.inf).softmax(-1)
        else:
            weights_TW = probs_TW * chosen_TW
        if self.config.resolved_normalize() != "none":
            weights_TW = self._among_experts(weights_TW)
        return self.routing(tokens, logits=logits_TW, probs=probs_TW, weights=weights_TW)

    @property
    def decodes(self) -> bool:
        """See `Router.decodes`."""
        plain = not self.null_experts and not self.costs and self.selection_bias is None
        own = type(self) is TopKRouter and self.config.norm == "none" and self.per == "token"
        return plain and own

    def decode(self, logits: Float[Tensor, "T E"]) -> Float[Tensor, "T E"]:
        """See `Router.decode`."""
        if self.temperature != 1.0:
            logits = logits / self.temperature
        normalized = self.config.resolved_normalize() != "none"
        if not logits.is_cpu:
            chosen_TE = select_top_k(logits, self.k)
            if normalized:
                return logits.masked_fill(~chosen_TE, -torch.inf).softmax(-1)
            return logits.softmax(-1) * chosen_TE
        # On a CPU the fewest operations; stable, so that the lower index comes first among equals.
        scores_TE, order_TE = logits.sort(dim=-1, descending=True, stable=True)
        chosen_TK = order_TE[:, : self.k]
        if normalized:
            weights_TK = scores_TE[:, : self.k].softmax(-1)
        else:
            weights_TK = logits.softmax(-1).gather(-1, chosen_TK)
        return torch.zeros_like(logits).scatter_(-1, chosen_TK, weights_TK)

    @property
    def _has_kernel(self) -> bool:
        """Whether the kernel of the gate knows these settings; compiled code fuses by itself."""
        plain = self.selection_bias is None and not self.null_experts
        return plain and self.width <= MOST_EXPERTS and not torch.compiler.is_compiling()

    def _among_experts(self, weights: Float[Tensor, "T W"]) -> Float[Tensor, "T W"]:
        """Normalise the weights of the experts, whatever the null experts take."""
        if not self.null_experts:
            return renormalize(weights)
        own, null = weights.split([self.num_experts, self.null_experts], -1)
        total = own.sum(-1, keepdim=True)
        # A token may have chosen null experts only: its weights stay zero.
        return torch.cat([own / torch.where(total == 0, torch.ones_like(total), total), null], -1)

    def _noise(
        self, hidden: Float[Tensor, "T D"], logits: Float[Tensor, "T W"]
    ) -> Float[Tensor, "T W"]:
        noise_TW = torch.randn_like(logits) * self.config.noise_std
        if self.noise_weight is None:
            return noise_TW
        if self.config.input == "stop_gradient":
            hidden = hidden.detach()
        return noise_TW * F.softplus(float32_linear(hidden, self.noise_weight))
