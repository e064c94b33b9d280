"""Which stock class a trained mixture is written as."""

from dataclasses import replace

from moeadapt.errors import UnsupportedError
from moeadapt.export.engines import Verdict, check_engines
from moeadapt.export.mixture import Mixture
from moeadapt.export.refusals import ELSEWHERE
from moeadapt.export.targets import MoeShape, Target, find_target, targets_of

BIASES = ("e_score_correction_bias", "expert_bias")
"""Ends of the names of tensors that change a choice and no weight."""


def choose_target(
    mixture: Mixture, name: str, engines: list[str], *, untie: bool
) -> tuple[Target, list[Verdict]]:
    """Return the first class that holds the mixture and that the engines run, and the verdicts.

    Args:
        mixture: what is to be written.
        name: a key of `EXPORTERS`, or `"auto"`.
        engines: where it must run.
        untie: write the output head as its own tensor where the base shares it.

    Raises:
        ConfigError: a name is unknown.
        UnsupportedError: no class holds it, or an engine would be wrong; says why.
    """
    dense, scoring = mixture.source.config, mixture.rule.scoring
    names = [name]
    if name == "auto":
        fitting = targets_of(dense, additive=mixture.additive)
        names = [t.name for t in fitting if scoring in (None, t.scoring)] or [name]
        if fitting and names == [name]:
            others = {t.name: t.scoring for t in fitting}
            router = {"softmax": "top_k", "sigmoid": "sigmoid"}[fitting[0].scoring]
            raise UnsupportedError(
                f"{dense.model_type} with placement={mixture.config.placement!r} is held by "
                f"{others}, and the router computes a {scoring}; train with "
                f"router={{'name': {router!r}, 'k': 2}}. {ELSEWHERE}"
            )
    refused: dict[str, UnsupportedError] = {}
    for each in names:
        try:
            cls = find_target(each, dense, additive=mixture.additive, scoring=scoring)
            chosen = _shaped(mixture, cls, untie=untie)
            return chosen, check_engines(chosen, engines)
        except UnsupportedError as error:
            refused[each] = error
    if len(refused) == 1:
        raise next(iter(refused.values()))
    raise UnsupportedError("; ".join(f"{each}: {error}" for each, error in refused.items()))


def _shaped(mixture: Mixture, cls: type[Target], *, untie: bool) -> Target:
    rule, width, shared = mixture.rule, mixture.expert_width, mixture.shared_width
    norm = rule.norm
    if norm is None:
        norm = True in cls.norm_choices
    shape = MoeShape(
        num_experts=mixture.num_experts,
        top_k=rule.top_k,
        expert_width=width,
        shared_width=shared,
        norm_topk=norm,
        untie=untie,
        dense_layers=mixture.dense_layers,
    )
    dense = mixture.source.config
    try:
        chosen = cls(dense, shape)
    except UnsupportedError:
        rounded = replace(shape, shared_width=-(-shared // width) * width)
        if rounded == shape:
            raise
        chosen = cls(dense, rounded)
    biased = [i for i in mixture.moe_layers if mixture.selection_bias(i) is not None]
    if biased and not any(fill.name.endswith(BIASES) for fill in chosen.fills(biased[0])):
        raise UnsupportedError(
            f"{cls.name}: the router has a selection bias (balance loss 'loss_free'), and this "
            "class has none; those of sigmoid routers do (glm4_moe with placement='glu'), or "
            "train with balance={'switch': 0.01}"
        )
    return chosen
