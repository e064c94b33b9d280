"""One vector of output scales per expert: y = base(x) * (1 + sum_e w_e v_e).

Letters: T tokens, D in, O out, N routed and shared experts.

Source: Zadouri et al. 2023 (MoV), https://arxiv.org/abs/2309.05444, section 2.2, mixtures of the
vectors of Liu et al. 2022 ((IA)^3), https://arxiv.org/abs/2205.05638, section 3.3. We differ: there
the mixture is of vectors l_e that start at one; ours is of v_e = l_e - 1, which is the same for
weights that sum to one and otherwise leaves the base what the experts do not take. There is no
rank and no alpha. What is scaled includes the bias, and what adapters activated before this one
added.
"""

from typing import ClassVar, Optional

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moeadapt.errors import UnsupportedError
from moeadapt.experts.base import BankSize, ExpertBank, ExpertConfig, Factor, Init


class Ia3Bank(ExpertBank):
    """The gated axis holds the weights themselves; `up` mixes the vectors and scales `onto`."""

    factor_names: ClassVar = ("ia3_scale",)
    inits: ClassVar = ("zero_b", "random")
    refused: ClassVar = {
        "ffn": "it scales the output of a linear, and experts that span the FFN add to it"
    }
    needs_base: ClassVar = True
    linear: ClassVar = False

    @classmethod
    def make_factors(
        cls, size: BankSize, init: Init, config: Optional["ExpertConfig"] = None
    ) -> dict[str, Factor]:
        """See `ExpertBank.make_factors`: zero unless random."""
        scale = Factor(size.total_experts, size.out_features)
        if init == "random":
            nn.init.normal_(scale.weight)
        return {"ia3_scale": scale}

    @property
    def scale(self) -> float:
        """See `ExpertBank.scale`: there is no rank and no alpha."""
        return 1.0

    def down(self, x: Float[Tensor, "*T D"]) -> Float[Tensor, "*T N"]:
        """See `ExpertBank.down`: a one per expert, whatever the token."""
        return x.new_ones(*x.shape[:-1], self.size.total_experts)

    def gate(
        self, hidden: Float[Tensor, "*T N"], weights: Float[Tensor, "*T N"] | None
    ) -> Float[Tensor, "*T N"]:
        """See `ExpertBank.gate`: the weights themselves."""
        return hidden if weights is None else weights

    def up(
        self, gated: Float[Tensor, "*T N"], onto: Float[Tensor, "*T O"] | None, inplace: bool
    ) -> Float[Tensor, "*T O"]:
        """See `ExpertBank.up`; never in place, since backward needs the base output.

        Raises:
            UnsupportedError: there is nothing to scale.
        """
        if onto is None:
            raise UnsupportedError("experts 'ia3' scale a base output; placement='ffn' has none")
        scale = self.apply("ia3_scale", gated)
        # A product of its own: 1 + scale would be rounded to the dtype first.
        return torch.addcmul(onto, onto, scale.to(onto.dtype))

    def apply_one(
        self, x: Float[Tensor, "T D"], expert: int, onto: Float[Tensor, "T O"] | None = None
    ) -> Float[Tensor, "T O"]:
        """See `ExpertBank.apply_one`."""
        assert onto is not None
        return onto * self.factor("ia3_scale").weight[:, expert].to(onto.dtype)

    def delta_weight(self, expert: int) -> Float[Tensor, "O D"]:
        """Refuse: it is a row scaling of the base weight.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "an expert of type 'ia3' scales the base output and is no matrix of its own"
        )


class Ia3Config(ExpertConfig):
    """A scale per output feature and expert; `r`, `lora_alpha` and dropout mean nothing here."""

    bank: ClassVar = Ia3Bank
