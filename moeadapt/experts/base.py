"""What every bank of experts is: all experts of one linear layer, around one gated rank axis.

    delta(x) = up( gate( down(x), weights ) )

`down` and `up` are independent of the routing (and, but for `glu`, linear), so E experts of rank r
are one LoRA of rank E*r whose rank axis is multiplied by the routing weights, token by token.

Letters: T tokens, D in, O out, E experts, R width of the gated axis.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Optional, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from moeadapt.experts.factor import Factor, multiply_onto
from moeadapt.experts.generation import Generation
from moeadapt.registry import ComponentConfig


@dataclass(frozen=True, kw_only=True)
class BankSize:
    """The sizes of one bank.

    Attributes:
        in_features: D.
        out_features: O.
        num_experts: E, the routed experts.
        num_shared: always-on experts beside them.
        rank: rank of one expert.
        scale: what every delta is multiplied by, alpha / rank.
        ranks: rank of each routed expert where they differ; None: all have `rank`.
    """

    in_features: int
    out_features: int
    num_experts: int
    num_shared: int = 0
    rank: int = 8
    scale: float = 1.0
    ranks: tuple[int, ...] | None = None

    @property
    def total_experts(self) -> int:
        """Routed and shared experts; the shared ones come last."""
        return self.num_experts + self.num_shared

    @property
    def all_ranks(self) -> tuple[int, ...]:
        """Rank of every expert, the shared ones last."""
        routed = self.ranks or (self.rank,) * self.num_experts
        return routed + (self.rank,) * self.num_shared

    def split(self, parts: int) -> "BankSize":
        """Cut each expert into `parts` experts of `rank / parts`, with the same scale."""
        return replace(
            self,
            num_experts=self.num_experts * parts,
            num_shared=self.num_shared * parts,
            rank=self.rank // parts,
        )


Init = Literal["zero_b", "gaussian", "orthogonal", "random"]
"""`zero_b`: uniform A, zero B; `gaussian`: normal A of std 1/rank, zero B; `orthogonal`: rows of A
orthogonal across experts, zero B; `random`: no zero."""


class ExpertBank(ABC):
    """All experts of one linear layer.

    The tensors live in leaf modules that the layer owns, one `ModuleDict` per factor with an entry
    per adapter; the bank looks them up at each use, since wrappers may replace a leaf.

    Attributes:
        factor_names: the factors this type needs.
        frozen: those of them that are never trained.
        inits: the initialisations it can start from.
        refused: placement -> why this type cannot work there.
        needs_base: whether `apply_one` must be told the base output.
        linear: whether an expert is one matrix, so that `delta_weight` exists.
        reads_with: the factor that `down` multiplies by, where it does nothing else; None: more.
        size: the sizes.
        impl: the form that computes it, see `moeadapt.dispatch.choose`.
        generation: what tells that tokens are being generated, so that matrices may be kept.
    """

    factor_names: ClassVar[tuple[str, ...]]
    frozen: ClassVar[tuple[str, ...]] = ()
    inits: ClassVar[tuple[Init, ...]] = get_args(Init)
    refused: ClassVar[Mapping[str, str]] = {}
    needs_base: ClassVar[bool] = False
    linear: ClassVar[bool] = True
    reads_with: ClassVar[str | None] = None

    def __init__(
        self,
        size: BankSize,
        factors: Mapping[str, nn.ModuleDict],
        adapter: str = "default",
        config: Optional["ExpertConfig"] = None,
    ) -> None:
        """Look at `factors[name][adapter]` for each factor name."""
        self.size = size
        self.config: Any = config
        self.impl: Literal["auto", "concat", "grouped", "gather"] = "auto"
        self.generation = Generation()
        self._factors = {name: factors[name] for name in self.factor_names}
        self._adapter = adapter

    def factor(self, name: str) -> Factor:
        """Return the leaf module that holds the factor."""
        return self._factors[name][self._adapter]  # type: ignore[return-value]

    @property
    def owns_ranks(self) -> bool:
        """Whether expert e is its own rows of lora_A and columns of lora_B, `size.all_ranks`.

        And nothing but the routing weights says how much of it is added.
        """
        return False

    @property
    def stacked(self) -> bool:
        """Whether `owns_ranks`, and all experts have the same rank."""
        return self.size.ranks is None and self.owns_ranks

    @property
    def scale(self) -> float:
        """What routing weights are multiplied by on their way to `gate`."""
        return self.size.scale

    def scaled(self, weights: Float[Tensor, "*T E"], dtype: torch.dtype) -> Float[Tensor, "*T N"]:
        """Return what `gate` takes: the weights and a 1 per shared expert, times `scale`."""
        if self.size.num_shared:
            weights = F.pad(weights, (0, self.size.num_shared), value=1.0)
        return (weights * self.scale).to(dtype)

    def apply(
        self,
        name: str,
        x: Float[Tensor, "*T I"],
        onto: Float[Tensor, "*T J"] | None = None,
        inplace: bool = False,
    ) -> Float[Tensor, "*T J"]:
        """Multiply by a factor, see `Factor.forward`; while generating, by its kept copy."""
        factor = self.factor(name)
        if self.generation.keeps and factor.is_whole:
            return multiply_onto(x, self.matrix(name, x.dtype), onto, inplace)
        return factor(x, onto, inplace)

    def matrix(self, name: str, dtype: torch.dtype) -> Float[Tensor, "J I"]:
        """Return a factor that `is_whole`, in `dtype`."""
        weight = self.factor(name).weight
        return self.generation.cast(weight, dtype) if self.generation.keeps else weight.to(dtype)

    @classmethod
    @abstractmethod
    def make_factors(
        cls, size: BankSize, init: Init, config: Optional["ExpertConfig"] = None
    ) -> dict[str, Factor]:
        """Allocate and initialise fresh factors; `config`: None for the defaults."""

    def costs(self) -> tuple[float, ...]:
        """Return what each routed expert costs, relative to the dearest one."""
        return (1.0,) * self.size.num_experts

    @abstractmethod
    def down(self, x: Float[Tensor, "*T D"]) -> Float[Tensor, "*T R"]:
        """Project tokens onto the gated axis."""

    @abstractmethod
    def gate(
        self, hidden: Float[Tensor, "*T R"], weights: Float[Tensor, "*T N"] | None
    ) -> Float[Tensor, "*T R"]:
        """Multiply each expert's part of the axis by its weight.

        Args:
            hidden: what `down` returned.
            weights: what `scaled` returned, N = routed + shared experts; None: `size.scale` for
                every expert.
        """

    @abstractmethod
    def up(
        self, gated: Float[Tensor, "*T R"], onto: Float[Tensor, "*T O"] | None, inplace: bool
    ) -> Float[Tensor, "*T O"]:
        """Project back to the output and add to `onto`."""

    @abstractmethod
    def apply_one(
        self, x: Float[Tensor, "T D"], expert: int, onto: Float[Tensor, "T O"] | None = None
    ) -> Float[Tensor, "T O"]:
        """Define what expert `expert` adds to the base output; shared experts come last.

        Args:
            x: tokens.
            expert: which one.
            onto: the base output; read only where `needs_base`.
        """

    @abstractmethod
    def delta_weight(self, expert: int) -> Float[Tensor, "O D"]:
        """Return the matrix that expert `expert` adds to the base weight.

        Raises:
            UnsupportedError: there is none, see `linear`.
        """


class ExpertConfig(ComponentConfig, ABC):
    """Settings of one expert type; `bank` is the class that computes it."""

    bank: ClassVar[type[ExpertBank]]

    def sized(self, size: BankSize) -> BankSize:
        """Return what `size`, counted in the adapter's experts, becomes with this type."""
        return size

    def refusal(self, placement: str) -> str | None:
        """Return why this type cannot work in `placement`, or None."""
        return self.bank.refused.get(placement)

    def check(self, size: BankSize) -> None:
        """Refuse a size, as `sized` returned it, that the settings do not fit.

        Raises:
            ConfigError: names the field, its value and what is allowed.
        """

    def build(self, size: BankSize, *, init: Init = "zero_b") -> ExpertBank:
        """Make a stand-alone bank with fresh factors (a layer owns its factors itself).

        `size` is taken as it is: see `sized`.
        """
        fresh = self.bank.make_factors(size, init, self)
        factors = {k: nn.ModuleDict({"default": f}) for k, f in fresh.items()}
        return self.bank(size, factors, "default", self)


def fill_a(a: Factor, init: Init, rank: int) -> None:
    """Start a projection onto the ranks."""
    if init == "gaussian":
        nn.init.normal_(a.weight, std=1 / rank)
    elif init == "orthogonal":
        width = a.weight.shape[1]
        with torch.no_grad():
            # No more than `width` rows can be orthogonal to each other.
            for rows in a.weight.split(width):
                # As long as the rows of the uniform start are on average.
                nn.init.orthogonal_(rows, gain=math.sqrt(1 / 3))
    else:
        nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))


def fill_b(b: Factor, init: Init) -> None:
    """Start a projection to the output: zero unless `init` says otherwise."""
    if init == "random":
        nn.init.normal_(b.weight, std=1 / math.sqrt(b.weight.shape[1]))
