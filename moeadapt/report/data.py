"""Every number of a report: what `collect` measures, `render` shows and the JSON file holds.

Layers may differ in their number of experts: E is then that of the layer, and nothing is padded.

Letters: L layers (or blocks) with a router, E experts, D domains, T tokens.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

Matrix = list[list[float]]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One tile at the top.

    Attributes:
        name: `balanced`, `specialised`, `used` or `worth it`.
        answer: `yes`, `no` or `unclear`.
        value: the number behind it.
        unit: of the number.
        reason: one sentence with the threshold.
    """

    name: str
    answer: str
    value: float
    unit: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Held-out loss under one way of routing, same texts, same weights.

    Attributes:
        name: `learned`, `uniform`, `random`, `shuffled`, `best single expert`, `adapter off`.
        nll: mean over tokens, in nats per token, with a 95 % interval from a bootstrap over texts.
        difference: to `learned`, text by text, in nats per token, with its interval; above 0:
            worse than learned routing. 0 for `learned` itself. The best single expert is chosen on
            one half of the texts and measured on the other, both ways round.
    """

    name: str
    nll: float
    nll_low: float
    nll_high: float
    difference: float
    difference_low: float
    difference_high: float


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One router.

    Attributes:
        name: path of the layer or block.
        load: share of the used slots of each expert [E], sums to one.
        importance: mean probability of each expert [E]; below one in sum with null experts.
        max_over_mean: largest load times E; 1 is balance. This and the next two are NaN where no
            token uses an expert.
        cv: standard deviation of the load over its mean; 0 is balance.
        effective_experts: exponential of the entropy of the load, from 1 to E.
        active: experts that a token uses, mean.
        entropy: of a token's probabilities, null experts included, mean, in bits.
        lift: how much oftener a domain uses an expert than all tokens do [D][E]; 1 is as often.
        p_value: of that lift, two-sided, by permutation of the domains of the texts [D][E]; not
            adjusted for their number, which the page does.
        mutual_information: between domain and main expert, or none, in bits.
        mutual_information_null: mean under permutation, in bits.
        mutual_information_high: what one permutation in 20 exceeds, in bits.
        mutual_information_p: share of permutations that reach it.
        similarity: cosine of the experts' weight changes [E][E]; None for experts without any.
        coactivation: share of tokens that use both experts [E][E].
    """

    name: str
    load: list[float]
    importance: list[float]
    max_over_mean: float
    cv: float
    effective_experts: float
    active: float
    entropy: float
    lift: Matrix
    p_value: Matrix
    mutual_information: float
    mutual_information_null: float
    mutual_information_high: float
    mutual_information_p: float
    similarity: Matrix | None
    coactivation: Matrix


@dataclass(frozen=True, kw_only=True)
class Flow:
    """Tokens that go from the main expert of one layer to that of the next.

    Attributes:
        layer: index of the first of the two layers.
        shares: [E][E of the next layer], all entries together sum to one. Tokens that use no
            expert in one of the two are left out.
    """

    layer: int
    shares: Matrix


@dataclass(frozen=True, kw_only=True)
class ColoredText:
    """The start of a held-out text, token by token, and the largest slots of each token.

    Attributes:
        domain: its domain.
        tokens: the text of each token [T].
        experts: used experts of each token in each layer, the largest weight first
            [L][T][slots].
        weights: their weights, the same shape.
    """

    domain: str
    tokens: list[str]
    experts: list[list[list[int]]]
    weights: list[list[list[float]]]


@dataclass(frozen=True, kw_only=True)
class TrainingPoint:
    """One logged step of the training: its `loss` and `moe/` metrics as they were logged."""

    step: int
    values: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """A whole report.

    Attributes:
        title: name of the adapter.
        settings: what was asked for: base, placement, router, experts, balance, ...
        num_experts: E, of the layer that has the most.
        domains: names, [D].
        texts_per_domain: how many held-out texts, [D].
        tokens: how many tokens were measured.
        cut: how many texts were longer than `max_length` tokens.
        permutations: of the texts' domains, behind every p value.
        verdicts: the tiles, in order.
        arms: the ways of routing, `learned` first.
        layers: the routers, in the order they run in.
        flows: between consecutive layers.
        texts: a few, to be shown coloured.
        training: logged steps; empty: none were found.
        versions: of moeadapt, torch, transformers, peft.
        seconds: what it took to measure.
    """

    title: str
    settings: dict[str, str]
    num_experts: int
    domains: list[str]
    texts_per_domain: list[int]
    tokens: int
    verdicts: list[Verdict]
    arms: list[Arm]
    layers: list[Layer]
    flows: list[Flow]
    texts: list[ColoredText]
    training: list[TrainingPoint] = field(default_factory=list)
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    cut: int = 0
    permutations: int = 1000

    def to_json(self) -> dict[str, Any]:
        """Return plain lists and dicts, every number included."""
        return asdict(self)
