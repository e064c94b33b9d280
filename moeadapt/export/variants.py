"""Makes experts out of one FFN: exact copies, noisy ones, partly new ones, granular ones.

Letters: D hidden width, I FFN width, M width of one expert, G experts per FFN.

Source: `drop` is Nakamura et al. 2025 (Drop-Upcycling), https://arxiv.org/abs/2502.19261, section
3: a random share of the FFN's hidden units is drawn anew from a normal with the mean and standard
deviation of the units it replaces, in each of the three matrices. `granularity` is the virtual
group initialisation of He et al. 2024 (Upcycling Large Language Models into Mixture of Experts),
https://arxiv.org/abs/2410.07524, section 4: the parts of one FFN share a router row. We differ:
they scale all three matrices by a cube root, which a gated FFN does not survive; we scale down_proj
alone by G, which is exact.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from moeadapt.errors import ConfigError
from moeadapt.export.dense import Glu


@dataclass(frozen=True, kw_only=True)
class Variation:
    """How experts differ from the FFN they come from.

    Attributes:
        noise: standard deviation of the noise over that of the matrix, at least 0.
        drop: share of hidden units drawn anew in every expert, in [0, 1].
        granularity: experts that one FFN is cut into, at least 1.
    """

    noise: float = 0.0
    drop: float = 0.0
    granularity: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.noise < float("inf"):
            raise ConfigError(f"noise={self.noise}: at least 0 and finite")
        if not 0 <= self.drop <= 1:
            raise ConfigError(f"drop={self.drop}: in [0, 1]")
        if self.granularity < 1:
            raise ConfigError(f"granularity={self.granularity}: at least 1")

    @property
    def is_exact(self) -> bool:
        """Whether the experts of one FFN together are that FFN."""
        return self.noise == 0 and self.drop == 0


def vary(ffn: Glu[Tensor], variation: Variation, generator: torch.Generator) -> Glu[Tensor]:
    """Return an FFN with new units and noise as `variation` says; the same one if it is exact."""
    if variation.is_exact:
        return ffn
    gate, up, down = (matrix.float() for matrix in ffn)
    width = gate.shape[0]
    count = round(variation.drop * width)
    if count:
        units = torch.randperm(width, generator=generator)[:count]
        gate[units] = _drawn_like(gate[units], generator)
        up[units] = _drawn_like(up[units], generator)
        down[:, units] = _drawn_like(down[:, units], generator)
    if variation.noise:
        for matrix in (gate, up, down):
            scale = variation.noise * matrix.std(correction=0)
            matrix.add_(torch.randn(matrix.shape, generator=generator), alpha=float(scale))
    return Glu(gate, up, down)


def _drawn_like(old: Float[Tensor, "R C"], generator: torch.Generator) -> Float[Tensor, "R C"]:
    fresh = torch.randn(old.shape, generator=generator)
    return fresh * old.std(correction=0) + old.mean()


def part(ffn: Glu[Tensor], index: int, granularity: int) -> Glu[Tensor]:
    """Return part `index` of the FFN's hidden units, with down_proj times `granularity`."""
    if granularity == 1:
        return ffn
    width = ffn.gate.shape[0] // granularity
    units = slice(index * width, (index + 1) * width)
    return Glu(ffn.gate[units], ffn.up[units], ffn.down[:, units] * granularity)
