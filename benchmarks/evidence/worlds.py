"""Two synthetic worlds whose best static adapter is known in closed form.

In `conflict` every domain maps the same input subspace to other outputs, and a few coordinates say
which domain a sample is from. What a sample needs is bilinear in input and domain, so no linear map
of any rank, hence no static adapter, gets below `bound`. In `separable` every domain has an input
subspace of its own, so that one linear map of rank K * r is exact, and a mixture cannot win.

Letters: T samples, D width of the input, O of the output, K domains, r rank of one domain's map.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

D, O, K, r = 32, 32, 4, 2  # noqa: E741
CUE = 3.0
"""Value of the coordinate that tells the domain; the others have variance 1."""

Kind = Literal["conflict", "separable"]


@dataclass(frozen=True)
class World:
    """One draw of a world.

    Attributes:
        kind: which of the two.
        maps: of each domain, from its subspace to the output [K, O, r].
        subspaces: orthonormal rows that read the input [K, r, D].
        seed: it was drawn with.
    """

    kind: Kind
    maps: Tensor
    subspaces: Tensor
    seed: int

    @staticmethod
    def draw(kind: Kind, seed: int) -> "World":
        """Draw the maps and subspaces."""
        generator = torch.Generator().manual_seed(seed)
        maps = torch.randn(K, O, r, generator=generator) / r**0.5
        # The last K coordinates are for the cue.
        basis = torch.linalg.qr(torch.randn(D - K, D - K, generator=generator))[0]
        basis = torch.cat([basis, torch.zeros(D - K, K)], 1)
        shared = kind == "conflict"
        rows = basis[:r].expand(K, r, D) if shared else basis[: K * r].reshape(K, r, D)
        return World(kind=kind, maps=maps, subspaces=rows, seed=seed)

    def sample(self, number: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs [T, D], outputs [T, O] and domains [T]."""
        generator = torch.Generator().manual_seed(1_000_003 * (self.seed + 1) + seed)
        domains = torch.randint(0, K, (number,), generator=generator)
        if self.kind == "conflict":
            x = torch.randn(number, D, generator=generator)
            x[:, -K:] = 0
            inner = torch.einsum("trd,td->tr", self.subspaces[domains], x)
            x[torch.arange(number), D - K + domains] = CUE
        else:
            inner = torch.randn(number, r, generator=generator)
            x = torch.einsum("tr,trd->td", inner, self.subspaces[domains])
        return x, torch.einsum("tor,tr->to", self.maps[domains], inner), domains

    @property
    def bound(self) -> float:
        """Return the least error of any linear map, as a share of the outputs' mean square.

        In `conflict` the inner coordinates have mean zero and do not depend on the domain, so the
        best linear map is the mean of the domains' maps, and what it leaves is their spread:
        `sum_z ||U_z - mean U||^2 / sum_z ||U_z||^2`. In `separable` it is 0.
        """
        if self.kind == "separable":
            return 0.0
        spread = self.maps - self.maps.mean(0)
        return float(spread.square().sum() / self.maps.square().sum())
