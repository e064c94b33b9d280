"""Which domain uses which expert, and whether texts dealt to domains at random would look alike.

The unit of a permutation is a text: the tokens of one text are no independent draws.

Letters: N texts, D domains, E experts, C experts and none, P permutations, Q permutations of a
part.

Source: permutation tests with the +1 correction, Phipson and Smyth 2010,
https://doi.org/10.2202/1544-6115.1585, eq. 2; mutual information, Cover and Thomas 2006, section
2.3.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moeadapt.report.adjust import LEVEL
from moeadapt.report.counts import LayerCounts

MOST_ENTRIES = 2**24
"""Entries of the permuted one-hot labels that are made at a time: 128 MB."""

LEAST_PERMUTATIONS, MOST_PERMUTATIONS = 1000, 10_000
MOST_LABELS = 2**25
"""Labels of all permutations together: 256 MB, and twice that while they are dealt."""

HIGH = 0.95
"""Quantile of the mutual information under permutation that is kept."""

ROUNDING = 1e-12
"""Bits that two equal mutual informations may differ by."""


@dataclass(frozen=True, kw_only=True)
class DomainUse:
    """How the domains use the experts of one layer.

    Attributes:
        lift: P(e | d) / P(e) over used slots; 1 where nothing was used.
        p_value: two-sided, of that lift: twice the smaller tail, at most 1.
        mutual_information: between domain and main expert of a token, or none, in bits.
        mutual_information_null: its mean over the permutations: what chance alone gives.
        mutual_information_high: what chance alone exceeds with a probability of 1 - `HIGH`.
        mutual_information_p: share of permutations that reach it, the observed one included.
    """

    lift: Float[Tensor, "D E"]
    p_value: Float[Tensor, "D E"]
    mutual_information: float
    mutual_information_null: float
    mutual_information_high: float
    mutual_information_p: float


def enough_permutations(num_domains: int, num_experts: int, num_texts: int) -> int:
    """Return how many let one lift alone be told from chance, if it is as unlikely as can be.

    Its p is then at most `LEVEL` after the adjustment for all domains and experts of a layer;
    beyond `MOST_PERMUTATIONS`, or `MOST_LABELS` labels in all, it may stay above.

    Args:
        num_domains: D.
        num_experts: E.
        num_texts: N.
    """
    # The smallest two-sided p is 2 / (P + 1), and the adjustment multiplies it by D E.
    wanted = math.ceil(2 * num_domains * num_experts / LEVEL)
    most = min(MOST_PERMUTATIONS, MOST_LABELS // num_texts)
    return max(min(wanted, most), LEAST_PERMUTATIONS)


def permuted_labels(labels: Int[Tensor, " N"], permutations: int, seed: int) -> Int[Tensor, "P N"]:
    """Return the domains of the texts, dealt anew in each row.

    Args:
        labels: domain of each text.
        permutations: P, >= 1.
        seed: the same one deals alike.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = [labels[torch.randperm(len(labels), generator=generator)] for _ in range(permutations)]
    return torch.stack(rows)


def compare_domains(
    labels: Int[Tensor, " N"],
    permuted: Int[Tensor, "P N"],
    num_domains: int,
    layer: LayerCounts,
) -> DomainUse:
    """Compare the domains' use of the experts with chance.

    Args:
        labels: domain of each text.
        permuted: what `permuted_labels` returned.
        num_domains: D; with one there is nothing to compare: lift 1, p 1, no information.
        layer: the counts.
    """
    used_NE = layer.used.double()
    # To use no expert is a choice too, and one that may tell the domain.
    main_NC = torch.cat([layer.main, layer.idle], -1).double()
    shape = (num_domains, layer.num_experts)
    if num_domains == 1:
        return DomainUse(
            lift=torch.ones(shape, dtype=torch.float64),
            p_value=torch.ones(shape, dtype=torch.float64),
            mutual_information=0.0,
            mutual_information_null=0.0,
            mutual_information_high=0.0,
            mutual_information_p=1.0,
        )
    own = _one_hot(labels.unsqueeze(0), num_domains)
    lift_DE = lifts(own @ used_NE)[0]
    bits = float(information(own @ main_NC)[0])
    above_DE = torch.zeros(shape, dtype=torch.float64)
    below_DE = torch.zeros(shape, dtype=torch.float64)
    parts = []
    for part in permuted.split(max(1, MOST_ENTRIES // (num_domains * len(labels)))):
        dealt_QDN = _one_hot(part, num_domains)
        null_QDE = lifts(dealt_QDN @ used_NE)
        above_DE += (null_QDE >= lift_DE).sum(0)
        below_DE += (null_QDE <= lift_DE).sum(0)
        parts.append(information(dealt_QDN @ main_NC))
    null_P = torch.cat(parts)
    reached = int((null_P >= bits - ROUNDING).sum())
    tails_DE = torch.minimum(above_DE, below_DE)
    return DomainUse(
        lift=lift_DE,
        p_value=(2 * (tails_DE + 1) / (len(permuted) + 1)).clamp(max=1),
        mutual_information=bits,
        mutual_information_null=float(null_P.mean()),
        mutual_information_high=float(null_P.quantile(HIGH)),
        mutual_information_p=(reached + 1) / (len(permuted) + 1),
    )


def _one_hot(labels: Int[Tensor, "Q N"], num_domains: int) -> Float[Tensor, "Q D N"]:
    domains_D1 = torch.arange(num_domains).unsqueeze(-1)
    return (labels.unsqueeze(1) == domains_D1).double()


def lifts(counts: Float[Tensor, "Q D E"]) -> Float[Tensor, "Q D E"]:
    """Return P(e | d) / P(e) of counts; 1 where the domain or the expert has none.

    Counts are whole numbers, so equal counts give equal bits and ties are found as ties.
    """
    by_expert_QE = counts.sum(1, keepdim=True)
    by_domain_QD = counts.sum(2, keepdim=True)
    expected = by_expert_QE * by_domain_QD
    lift = counts * counts.sum((1, 2), keepdim=True) / expected.clamp(min=1)
    return torch.where(expected == 0, torch.ones_like(lift), lift)


def information(counts: Float[Tensor, "Q D E"]) -> Float[Tensor, " Q"]:
    """Return the mutual information of rows and columns of a table of counts, in bits; >= 0."""
    joint = counts / counts.sum((1, 2), keepdim=True).clamp(min=1)
    apart = joint.sum(1, keepdim=True) * joint.sum(2, keepdim=True)
    ratio = torch.where(joint == 0, torch.ones_like(joint), joint / apart)
    return (joint * ratio.log2()).sum((1, 2)).clamp(min=0)
