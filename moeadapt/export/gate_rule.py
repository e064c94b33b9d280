"""How a trained router makes its weights, in the words of stock classes: scoring, k, norm.

Letters: E experts, W experts and null experts, K experts per token.
"""

from dataclasses import dataclass
from typing import Any

from moeadapt.errors import UnsupportedError
from moeadapt.export.refusals import ELSEWHERE
from moeadapt.routers import ROUTERS, Router


@dataclass(frozen=True, kw_only=True)
class GateRule:
    """What a stock router must compute; None where every choice gives the same weights.

    Attributes:
        scoring: softmax or sigmoid.
        top_k: experts per token.
        norm: whether the weights of the chosen experts are divided by their sum.
        null_experts: null experts that are written as experts that change nothing.
        scale: what the weights are multiplied by.
    """

    scoring: str | None
    top_k: int
    norm: bool | None
    null_experts: int = 0
    scale: float = 1.0


def gate_rule(router: Router, spec: Any, *, additive: bool) -> GateRule:
    """Return the rule of a router in eval mode.

    Args:
        router: its `k` is that of inference.
        spec: its settings.
        additive: experts stand beside the base's FFN; else their weights must sum to 1.

    Raises:
        UnsupportedError: no stock class has such weights; says why and what works instead.
    """
    experts, name = router.num_experts, ROUTERS.name_of(spec)
    if name == "uniform":
        return GateRule(scoring=None, top_k=experts, norm=True)
    if name == "gumbel" and spec.straight_through:
        return GateRule(scoring=None, top_k=1, norm=True)
    if name in ("soft", "gumbel"):
        return GateRule(scoring="softmax", top_k=experts, norm=None)
    k: Any = getattr(router, "k")  # noqa: B009
    if name == "random":
        # A top-k gate that was never trained; always normalised.
        return GateRule(scoring=None if k == 1 else "softmax", top_k=k, norm=True)
    if name == "sigmoid":
        return _sigmoid(router, spec, k, additive=additive)
    normalised = spec.resolved_normalize() != "none"
    if router.null_experts:
        return _with_null(router, k, normalised=normalised, additive=additive)
    if k == experts:
        return GateRule(scoring="softmax", top_k=k, norm=None)
    if not normalised and not additive:
        raise UnsupportedError(
            f"router {name!r} with k={k} leaves its weights unnormalised, so that the base FFN "
            "takes what they leave of 1, and no stock class has such a remainder. Train with "
            "normalize='renorm' and k at least 2, or with placement='glu', where unnormalised "
            f"weights fit some classes. {ELSEWHERE}"
        )
    any_scoring = normalised and k == 1 and not _is_biased(router)
    return GateRule(scoring=None if any_scoring else "softmax", top_k=k, norm=normalised)


def _is_biased(router: Router) -> bool:
    """Whether a bias on the probabilities, and so what they are, has a say in the choice."""
    bias = router.selection_bias
    return bias is not None and bool(bias.any())


def _sigmoid(router: Router, spec: Any, k: int, *, additive: bool) -> GateRule:
    if not additive and not (spec.renorm and spec.scale == 1.0):
        raise UnsupportedError(
            f"router 'sigmoid' with renorm={spec.renorm}, scale={spec.scale}: its weights do not "
            "sum to 1, so that the base FFN takes the rest, and no stock class has such a "
            f"remainder. Train with renorm=True and scale=1, or with placement='glu'. {ELSEWHERE}"
        )
    scoring = None if k == 1 and spec.renorm and not _is_biased(router) else "sigmoid"
    return GateRule(scoring=scoring, top_k=k, norm=spec.renorm, scale=spec.scale)


def _with_null(router: Router, k: int, *, normalised: bool, additive: bool) -> GateRule:
    """Return the rule where stock weights, shared with null experts, are the same as ours."""
    null, everyone = router.null_experts, k == router.width
    if normalised and everyone:
        # Normalised among the others, the weights do not see the null experts at all.
        return GateRule(scoring="softmax", top_k=router.num_experts, norm=None)
    if normalised and k == 1:
        scoring = "softmax" if _is_biased(router) else None
        return GateRule(scoring=scoring, top_k=1, norm=True, null_experts=null)
    if not normalised and (additive or everyone):
        norm = None if everyone else False
        return GateRule(scoring="softmax", top_k=k, norm=norm, null_experts=null)
    raise UnsupportedError(
        f"router 'top_k' with k={k} and null_experts={null}: here the weights are normalised among "
        "the experts that are not null"
        + (", or left as they are, and the base FFN takes the rest" if not normalised else "")
        + ", while a stock class divides by the sum of all chosen. Train with null_experts=0, or "
        "with placement='glu' and normalize='none' (qwen2_moe). " + ELSEWHERE
    )
