"""The stock mixture classes that a checkpoint can be written as: one file and one entry each."""

from collections.abc import Mapping

from transformers import PretrainedConfig

from moeadapt.errors import ConfigError, UnsupportedError, did_you_mean
from moeadapt.export.targets.base import Fill, MoeShape, Place, Target
from moeadapt.export.targets.cohere2_moe import Cohere2Moe
from moeadapt.export.targets.ernie4_5_moe import Ernie45Moe
from moeadapt.export.targets.flex_olmo import FlexOlmo
from moeadapt.export.targets.glm4_moe import Glm4Moe
from moeadapt.export.targets.granite_moe import GraniteMoe
from moeadapt.export.targets.granite_moe_shared import GraniteMoeShared
from moeadapt.export.targets.hunyuan_moe_v1 import HunYuanMoEV1
from moeadapt.export.targets.lfm2_moe import Lfm2Moe
from moeadapt.export.targets.mixtral import Mixtral
from moeadapt.export.targets.qwen2_moe import Qwen2Moe
from moeadapt.export.targets.qwen3_5_moe import Qwen35Moe
from moeadapt.export.targets.qwen3_moe import Qwen3Moe

EXPORTERS: Mapping[str, type[Target]] = {
    target.name: target
    for target in (
        Mixtral,
        Qwen2Moe,
        Qwen3Moe,
        Qwen35Moe,
        FlexOlmo,
        GraniteMoe,
        GraniteMoeShared,
        Ernie45Moe,
        Cohere2Moe,
        HunYuanMoEV1,
        Lfm2Moe,
        Glm4Moe,
    )
}
"""Name -> target; where several fit a base, `auto` takes the first."""

__all__ = ["EXPORTERS", "Fill", "MoeShape", "Place", "Target", "find_target", "targets_of"]

ELSEWHERE = (
    "keep the model in transformers with moeadapt, or merge a trained mixture into an ordinary "
    "LoRA (moeadapt.merge)"
)


def targets_of(dense: PretrainedConfig, *, additive: bool = False) -> list[type[Target]]:
    """Return the targets that can hold a mixture of `dense`, the preferred one first."""
    found = EXPORTERS.values()
    return [target for target in found if target.refusal(dense, additive=additive) is None]


def find_target(
    name: str, dense: PretrainedConfig, *, additive: bool = False, scoring: str | None = None
) -> type[Target]:
    """Return the target called `name`, or with `"auto"` the preferred one for `dense`.

    Args:
        name: a key of `EXPORTERS`, or `"auto"`.
        dense: the base's configuration.
        additive: small experts beside the base's FFN, instead of whole FFNs.
        scoring: `"softmax"` or `"sigmoid"`, what the router must compute; any if None.

    Raises:
        ConfigError: no target has that name.
        UnsupportedError: the target cannot hold a mixture of this base, or none can; says why.
    """
    if name != "auto":
        if name not in EXPORTERS:
            raise ConfigError(
                f"unknown target {name!r}; one of {['auto', *sorted(EXPORTERS)]}"
                f"{did_you_mean(name, EXPORTERS)}"
            )
        tried = [EXPORTERS[name]]
    else:
        tried = list(EXPORTERS.values())
    reasons = {}
    for target in tried:
        why = target.refusal(dense, additive=additive)
        if why is None and scoring not in (None, target.scoring):
            why = f"its router computes a {target.scoring}, not a {scoring}"
        if why is None:
            return target
        reasons[target] = why
    raise UnsupportedError(_no_target(dense, reasons, additive))


def _no_target(dense: PretrainedConfig, reasons: dict[type[Target], str], additive: bool) -> str:
    named = {
        target.name: why
        for target, why in reasons.items()
        if len(reasons) == 1
        or dense.model_type in (target.additive_bases if additive else target.bases)
    }
    why = "; ".join(f"{name}: {reason}" for name, reason in named.items())
    others = [target.name for target in targets_of(dense, additive=additive)]
    if others:
        return f"{dense.model_type} cannot be written so: {why}; what can: {others}"
    return (
        f"no stock mixture class holds {dense.model_type!r} exactly"
        f"{f' ({why})' if why else ''}; {ELSEWHERE}"
    )
