"""Small gated FFNs: FFN_e(x) = scale * down_e(act(gate_e x) * up_e x), beside the frozen FFN.

E experts of width m are one gated FFN of width E*m whose hidden axis is multiplied by the routing
weights, token by token. Here the gated axis of `ExpertBank` is that hidden axis, so `down` is not
linear, and the factor named `glu_down` is what `up` multiplies by.

Letters: T tokens, D in, O out, m width of one expert, R = N * m, N routed and shared experts.

Source: the gated FFN: Shazeer 2020, https://arxiv.org/abs/2002.05202, eq. 6; small routed FFNs
beside one that every token uses: Dai et al. 2024 (DeepSeekMoE), https://arxiv.org/abs/2401.06066,
section 3.2. We differ: the FFN that every token uses is the frozen one of the base model, and the
experts start with zero down projections.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, ClassVar, Optional

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from moeadapt.errors import UnsupportedError
from moeadapt.experts.base import (
    BankSize,
    ExpertBank,
    ExpertConfig,
    Factor,
    Init,
    fill_a,
    fill_b,
)
from moeadapt.experts.lora import multiply

Activation = Callable[[Tensor], Tensor]


class GluBank(ExpertBank):
    """Gate and up are [R, D] and down is [O, R]: each expert owns m consecutive rows and columns.

    `size.rank` is the width m of one expert.

    Attributes:
        activation: applied to the gate's output; SiLU until a layer sets that of the base FFN.
    """

    factor_names: ClassVar = ("glu_gate", "glu_up", "glu_down")
    inits: ClassVar = ("zero_b", "random")
    refused: ClassVar = dict.fromkeys(
        ("linear", "ffn"), "each expert is a small FFN of its own, which stands beside the base FFN"
    )
    linear: ClassVar = False

    def __init__(
        self,
        size: BankSize,
        factors: Mapping[str, nn.ModuleDict],
        adapter: str = "default",
        config: Optional["ExpertConfig"] = None,
    ) -> None:
        """See `ExpertBank`."""
        super().__init__(size, factors, adapter, config)
        self.activation: Activation = F.silu

    @classmethod
    def make_factors(
        cls, size: BankSize, init: Init, config: Optional["ExpertConfig"] = None
    ) -> dict[str, Factor]:
        """See `ExpertBank.make_factors`: zero down unless random."""
        width = sum(size.all_ranks)
        gate, up = Factor(size.in_features, width), Factor(size.in_features, width)
        down = Factor(width, size.out_features)
        fill_a(gate, init, size.rank)
        fill_a(up, init, size.rank)
        fill_b(down, init)
        return {"glu_gate": gate, "glu_up": up, "glu_down": down}

    def down(self, x: Float[Tensor, "*T D"]) -> Float[Tensor, "*T R"]:
        """See `ExpertBank.down`: the hidden axis of all experts."""
        gate, up = _finite(self.apply("glu_gate", x)), _finite(self.apply("glu_up", x))
        return _finite(self.activation(gate) * up)

    def gate(
        self, hidden: Float[Tensor, "*T R"], weights: Float[Tensor, "*T N"] | None
    ) -> Float[Tensor, "*T R"]:
        """See `ExpertBank.gate`: the routing weights, not the experts' own gates."""
        if weights is None:
            return hidden * self.size.scale
        scaled = weights.unsqueeze(-1)
        experts = hidden.unflatten(-1, (self.size.total_experts, self.size.rank))
        return multiply(experts, scaled).flatten(-2)

    def up(
        self, gated: Float[Tensor, "*T R"], onto: Float[Tensor, "*T O"] | None, inplace: bool
    ) -> Float[Tensor, "*T O"]:
        """See `ExpertBank.up`."""
        return self.apply("glu_down", gated, onto, inplace)

    def apply_one(
        self, x: Float[Tensor, "T D"], expert: int, onto: Float[Tensor, "T O"] | None = None
    ) -> Float[Tensor, "T O"]:
        """See `ExpertBank.apply_one`."""
        own = slice(expert * self.size.rank, (expert + 1) * self.size.rank)
        gate, up = (self.factor(n).weight[own].T.to(x.dtype) for n in ("glu_gate", "glu_up"))
        down = self.factor("glu_down").weight[:, own].T.to(x.dtype)
        return self.size.scale * ((self.activation(x @ gate) * (x @ up)) @ down)

    def delta_weight(self, expert: int) -> Float[Tensor, "O D"]:
        """Refuse: a gated FFN is not linear.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError("an expert of type 'glu' is a small FFN and no matrix of its own")


def _finite(hidden: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Clip what overflows float16, also of experts that are not chosen: 0 * inf is NaN."""
    if hidden.dtype != torch.float16:
        return hidden
    most = torch.finfo(hidden.dtype).max
    return hidden.clamp(-most, most)


class GluConfig(ExpertConfig):
    """Small gated FFNs with the activation of the base FFN, for `placement="glu"`.

    The adapter's `r` and `lora_alpha` mean nothing to them.

    Attributes:
        dim: width m of the hidden layer of one expert, >= 1.
        scale: what the sum of the experts is multiplied by, > 0.
    """

    bank: ClassVar = GluBank

    dim: Annotated[int, Field(ge=1)] = 128
    scale: Annotated[float, Field(gt=0)] = 1.0

    def sized(self, size: BankSize) -> BankSize:
        """See `ExpertConfig.sized`."""
        return replace(size, rank=self.dim, scale=self.scale)
