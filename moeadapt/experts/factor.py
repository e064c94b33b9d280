"""One matrix of a bank of experts, in a leaf module that computes with it.

Letters: T tokens, D in, O out.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class Factor(nn.Module):
    """One matrix of a bank: a leaf module with its own forward.

    Computing inside the leaf is what ZeRO-3 and FSDP need to gather the matrix first.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        """Allocate the matrix, zero."""
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features, in_features))

    def forward(
        self,
        x: Float[Tensor, "*T D"],
        onto: Float[Tensor, "*T O"] | None = None,
        inplace: bool = False,
    ) -> Float[Tensor, "*T O"]:
        """`x @ weight.T`, added to `onto` if given; the small matrix is cast, never `x`."""
        return multiply_onto(x, self.weight.to(x.dtype), onto, inplace)

    @property
    def is_whole(self) -> bool:
        """Whether the matrix may be read outside this module's forward: it is all here.

        Wrappers that shard it (FSDP, ZeRO-3) replace the leaf, hook it, or leave it empty; those
        that keep it elsewhere (accelerate's offloading) replace its forward.
        """
        weight = self.weight
        return (
            type(self) is Factor
            and not (self._forward_hooks or self._forward_pre_hooks)
            and type(weight) is nn.Parameter
            and weight.numel() > 0
            and not weight.is_meta
            and "forward" not in vars(self)
            and not hasattr(weight, "ds_id")
        )

    def extra_repr(self) -> str:
        """Show the shape."""
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}"


def multiply_onto(
    x: Float[Tensor, "*T D"],
    weight: Float[Tensor, "O D"],
    onto: Float[Tensor, "*T O"] | None,
    inplace: bool,
) -> Float[Tensor, "*T O"]:
    """Return `x @ weight.T`, added to `onto` if given, into its memory if `inplace`."""
    if onto is None:
        return F.linear(x, weight)
    if x.dim() != 2 or onto.dtype != x.dtype:  # noqa: PLR2004
        return onto + F.linear(x, weight).to(onto.dtype)
    if inplace:
        return onto.addmm_(x, weight.t())
    return torch.addmm(onto, x, weight.t())
