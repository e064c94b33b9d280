"""The four answers at the top of a report, each from one number and a threshold.

Every threshold is a convention of this report, named and explained here. None says what an expert
is for: no topic is ever given to one.
"""

import math
from collections import Counter
from collections.abc import Sequence

from moeadapt.report.adjust import LEVEL
from moeadapt.report.arms import COVERAGE, OFF, RANDOM, SHUFFLED, SINGLE, UNIFORM
from moeadapt.report.data import Arm, Layer, Verdict

YES, NO, UNCLEAR = "yes", "no", "unclear"

BALANCED_MAX = 2.0
"""Largest load as a multiple of an even share, up to which a layer is balanced."""

UNBALANCED = 4.0
"""Multiple of an even share above which a layer is unbalanced, however many experts it has."""

COLLAPSE_SHARE = 0.75
"""How much of the way from an even load to collapse makes a layer unbalanced.

Collapse is that all tokens use the same experts: the largest load is then E / active times an even
share. Without regard to the experts per token, top-2 of 4 would be called balanced with two experts
that nobody uses.
"""

SOFT = 0.01
"""Experts that a token may leave unused on average, where its router is called soft."""

LEAST_BITS = 0.05
"""Bits of mutual information beyond chance that a layer needs: with many texts any trace of a
dependence is beyond chance, also one that does not matter."""

MOST_LAYERS = 0.5
"""Share of layers that more than must depend on domains for `yes`."""

USED_SHARE = 0.25
"""Share of an even load from which an expert counts as used."""

USED_YES, USED_NO = 0.95, 0.75
"""Share of used experts from which the answer is yes, and below which it is no."""

ROUNDING = 1e-5
"""Nats per token that equal routings may differ by; an interval so near 0 contains it."""

MARGIN = 0.01
"""Nats per token that count as no difference, about 1 % of the perplexity. Equal is only what an
interval within this margin shows to be equal; a wide interval around 0 shows nothing."""

LEAST_TEXTS = 8
"""Texts below which a bootstrap over them says nothing."""


def verdicts(
    layers: Sequence[Layer],
    arms: Sequence[Arm],
    texts_per_domain: Sequence[int],
    permutations: int,
    scored: int,
    *,
    causal: bool = True,
) -> list[Verdict]:
    """Return the answers in the order of the tiles.

    Args:
        layers: the routers.
        arms: the ways of routing.
        texts_per_domain: number of texts of each domain.
        permutations: how many were made.
        scored: texts that have a loss, for which two tokens are needed.
        causal: whether no router looks at later tokens; else its loss predicts nothing.
    """
    return [
        balanced(layers),
        specialised(layers, texts_per_domain, permutations),
        used(layers),
        worth_it(arms, scored, causal=causal),
    ]


def balanced(layers: Sequence[Layer]) -> Verdict:
    """Say whether every layer's load is even enough; the worst layer decides."""
    order = [YES, UNCLEAR, NO]
    worst = max(layers, key=lambda one: (order.index(_balance(one)), is_unused(one), _busiest(one)))
    answer, times = _balance(worst), _busiest(worst)
    of = "of the probability, since every token uses every expert" if is_soft(worst) else ""
    said = f"The busiest expert of {worst.name} gets {times:.2f} times an even share {of}".rstrip()
    if is_unused(worst):
        said = f"No token uses an expert of {worst.name}"
    yes = f"up to {BALANCED_MAX:g} times"
    if _limit(worst) <= BALANCED_MAX:
        yes = f"below {_limit(worst):.2f} times"
    limit = {
        YES: f"{yes} is balanced",
        UNCLEAR: f"balanced is up to {BALANCED_MAX:g} times, unbalanced {_limit(worst):.2f} times",
        NO: f"from {_limit(worst):.2f} times on, this layer is unbalanced",
    }[answer]
    return Verdict(
        name="balanced",
        answer=answer,
        value=times,
        unit="times an even share",
        reason=f"{said}." if is_unused(worst) else f"{said}; {limit}.",
    )


def is_unused(layer: Layer) -> bool:
    """Return whether no token uses an expert: all on null experts, or a gate that is shut."""
    return sum(layer.load) == 0


def is_soft(layer: Layer) -> bool:
    """Return whether every token uses every expert: then the load is even whatever happens."""
    return layer.active > len(layer.load) - SOFT and sum(layer.importance) > 0


def _shares(layer: Layer) -> list[float]:
    """Return what each expert gets [E], summing to one: of the slots, or of the probability."""
    if not is_soft(layer):
        return layer.load
    return [one / sum(layer.importance) for one in layer.importance]


def _busiest(layer: Layer) -> float:
    return max(_shares(layer)) * len(layer.load)


def _limit(layer: Layer) -> float:
    """Return the multiple of an even share from which the layer is unbalanced."""
    collapse = len(layer.load) / (1.0 if is_soft(layer) else max(layer.active, 1.0))
    return min(1 + COLLAPSE_SHARE * (collapse - 1), UNBALANCED)


def _balance(layer: Layer) -> str:
    if is_unused(layer):
        return NO
    # One expert alone cannot be uneven.
    if _limit(layer) > 1 and _busiest(layer) >= _limit(layer):
        return NO
    return YES if _busiest(layer) <= BALANCED_MAX else UNCLEAR


def specialised(
    layers: Sequence[Layer], texts_per_domain: Sequence[int], permutations: int
) -> Verdict:
    """Say whether the layers' main experts depend on the domain beyond chance."""
    depend = [
        one.mutual_information_p <= LEVEL
        and one.mutual_information - one.mutual_information_null >= LEAST_BITS
        for one in layers
    ]
    alike = [_at_most(one) < LEAST_BITS for one in layers]
    share = sum(depend) / len(depend)
    least = max(smallest_p(texts_per_domain), 1 / (permutations + 1))
    if len(texts_per_domain) == 1:
        answer, reason = UNCLEAR, "There is one domain only, so there is nothing to compare."
    elif least > LEVEL:
        answer = UNCLEAR
        reason = (
            f"{sum(texts_per_domain)} texts and {permutations} permutations cannot tell a "
            f"dependence from chance at p <= {LEVEL:g}."
        )
    else:
        answer = YES if share > MOST_LAYERS else NO if all(alike) else UNCLEAR
        reason = (
            f"In {sum(depend)} of {len(depend)} layers the main expert of a token tells at least "
            f"{LEAST_BITS:g} bit more about its domain than chance does, with p <= {LEVEL:g}; in "
            f"{sum(alike)} the texts show that it tells less. Yes is more than half of the layers "
            "with the first, no is all of them with the second. Words alone can do this, even with "
            "an untrained router: whether it pays is the last answer."
        )
    return Verdict(
        name="specialised", answer=answer, value=share, unit="share of layers", reason=reason
    )


def _at_most(layer: Layer) -> float:
    """Return how many bits beyond chance a layer may have: what it has, and chance's own spread."""
    beyond = layer.mutual_information - layer.mutual_information_null
    return beyond + layer.mutual_information_high - layer.mutual_information_null


def smallest_p(texts_per_domain: Sequence[int]) -> float:
    """Return the smallest p that dealing the texts to the domains in every way can give.

    Domains of one size may trade their names, which changes no mutual information.
    """
    ways = math.factorial(sum(texts_per_domain))
    for size in texts_per_domain:
        ways //= math.factorial(size)
    alike = math.prod(math.factorial(n) for n in Counter(texts_per_domain).values())
    # Python's whole numbers may be too large for a float.
    return 0.0 if ways > alike * 10**9 else alike / ways


def used(layers: Sequence[Layer]) -> Verdict:
    """Say whether nearly all experts have work, over all layers."""
    each = [own * len(one.load) >= USED_SHARE for one in layers for own in _shares(one)]
    share = sum(each) / len(each)
    return Verdict(
        name="used",
        answer=YES if share >= USED_YES else NO if share < USED_NO else UNCLEAR,
        value=share,
        unit="share of experts",
        reason=(
            f"{sum(each)} of {len(each)} experts get at least {USED_SHARE:g} of an even share; "
            f"yes is from {USED_YES:.0%} on, no is below {USED_NO:.0%}."
        ),
    )


def worth_it(arms: Sequence[Arm], num_texts: int, *, causal: bool = True) -> Verdict:
    """Say whether learned routing has a lower loss than all else, no adapter included.

    No is shown too: a rival is clearly better, or the interval of `shuffled` is around 0 and within
    `MARGIN`. A wide interval is unclear.
    """
    rivals = [arm for arm in arms if arm.name in (UNIFORM, RANDOM, SHUFFLED, SINGLE, OFF)]
    weakest = min(rivals, key=lambda arm: arm.difference)
    shuffled = next(arm for arm in rivals if arm.name == SHUFFLED)
    better = [arm for arm in rivals if arm.difference_high < -ROUNDING]
    if not causal:
        answer, arm = UNCLEAR, weakest
        reason = "A router here looks at later tokens, so its loss is no prediction of them."
    elif num_texts < LEAST_TEXTS:
        answer, arm = UNCLEAR, weakest
        reason = f"{num_texts} texts are too few for an interval; give at least {LEAST_TEXTS}."
    elif better:
        answer, arm = NO, min(better, key=lambda one: one.difference)
        reason = f"{arm.name!r} has a lower loss than the learned routing, {_span(arm)}."
    elif _is_equal(shuffled):
        answer, arm = NO, shuffled
        reason = (
            "Which token gets which weights does not show in the loss: the loss of 'shuffled' "
            f"differs {_span(arm)}, within {MARGIN:g}."
        )
    elif all(one.difference_low > ROUNDING for one in rivals):
        answer, arm = YES, weakest
        reason = f"All else has a higher loss, {arm.name!r} the lowest of it, {_span(arm)}."
    else:
        answer = UNCLEAR
        arm = min(rivals, key=lambda one: one.difference_low)
        reason = f"{arm.name!r} and the learned routing cannot be told apart, {_span(arm)}."
    return Verdict(
        name="worth it",
        answer=answer,
        value=arm.difference,
        unit="nats per token",
        reason=reason,
    )


def _is_equal(arm: Arm) -> bool:
    """Return whether the interval holds 0 and nothing outside the margin."""
    low, high = arm.difference_low, arm.difference_high
    return low <= ROUNDING and high >= -ROUNDING and low >= -MARGIN and high <= MARGIN


def _span(arm: Arm) -> str:
    low, high = arm.difference_low, arm.difference_high
    interval = f"{COVERAGE:.0%} interval {low:+.4f} to {high:+.4f}"
    return f"by {arm.difference:+.4f} nats per token ({interval})"
